import Foundation

@testable import Tuwen

func resource(_ name: String) throws -> Data {
    let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("Resources")
    return try Data(contentsOf: folder.appendingPathComponent(name))
}

/// The vocabulary of the checkout, five folders above.
func vocabulary() throws -> Data {
    var folder = URL(fileURLWithPath: #filePath)
    for _ in 0..<5 { folder.deleteLastPathComponent() }
    return try Data(contentsOf: folder.appendingPathComponent("tuwen/vocab.txt"))
}
