/// What can go wrong, in a sentence that an app may show.
public struct TuwenError: Error, Equatable, CustomStringConvertible {
    public let description: String

    public init(_ description: String) {
        self.description = description
    }
}
