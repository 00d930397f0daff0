import Foundation

/// `model.json`, which `tuwen export coreml` writes beside the two packages.
public struct ModelCard: Decodable, Equatable, Sendable {
    /// One of the two packages.
    public struct Tower: Decodable, Equatable, Sendable {
        /// File name, such as `vit_b_16_text.mlpackage`.
        public let package: String

        /// What Xcode calls the `.mlmodelc` that it makes of it, without that suffix.
        public var compiledName: String {
            package.hasSuffix(".mlpackage") ? String(package.dropLast(".mlpackage".count)) : package
        }
    }

    public let text: Tower
    public let image: Tower
    public let architecture: String
    /// Side of the square picture that the image tower takes, in pixels.
    public let resolution: Int
    /// Numbers of a vector.
    public let embedDim: Int
    /// Lengths of input_ids that the text tower takes, ascending.
    public let textBuckets: [Int]
    /// The most tokens of a text.
    public let contextLength: Int
    /// Of the weights; vectors of different ones must not be compared. A string, as 63 bits are more than JSON's numbers hold.
    public let fingerprint: String
    /// The learned temperature, a logarithm: logits are cosines times its exponential.
    public let logitScale: Float
    private let format: String

    enum CodingKeys: String, CodingKey {
        case text, image, architecture, resolution, fingerprint, format
        case embedDim = "embed_dim"
        case textBuckets = "text_buckets"
        case contextLength = "context_length"
        case logitScale = "logit_scale"
    }

    public init(json: Data) throws {
        do {
            self = try JSONDecoder().decode(ModelCard.self, from: json)
        } catch {
            throw TuwenError("model.json is not one that tuwen export coreml writes: \(error)")
        }
        guard format == "tuwen-coreml-1" else {
            throw TuwenError("model.json has format \(format), expected tuwen-coreml-1: export it again")
        }
    }
}
