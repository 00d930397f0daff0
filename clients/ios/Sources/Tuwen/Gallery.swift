import Foundation

/// Pictures of an app and their vectors, searched by cosine.
///
/// A safetensors file that `tuwen export gallery` writes: `image_embeds` float32 (N, D) of unit length, and in its
/// metadata `names`, a JSON list, and the `fingerprint` of the model that made them.
public struct Gallery: Sendable {
    public struct Match: Equatable, Sendable {
        public let name: String
        public let cosine: Float
    }

    public let names: [String]
    public let dimension: Int
    public let fingerprint: String
    private let embeds: [Float]

    /// - Throws: `TuwenError` where the file is damaged, or was made by another model than `fingerprint`.
    public init(safetensors data: Data, fingerprint expected: String? = nil) throws {
        let header = try Self.header(of: data)
        guard let tensor = header.tensor, tensor.dtype == "F32", tensor.shape.count == 2, tensor.offsets.count == 2,
            let rows = tensor.shape.first, let width = tensor.shape.last, rows >= 0, width > 0,
            tensor.offsets[0] >= 0, tensor.offsets[1] - tensor.offsets[0] == rows * width * 4,
            header.bodyStart + tensor.offsets[1] <= data.count
        else { throw TuwenError("gallery: expected image_embeds, float32 of two dimensions, in a whole file") }
        guard header.names.count == rows else {
            throw TuwenError("gallery: \(header.names.count) names for \(rows) vectors")
        }
        if let expected, expected != header.fingerprint {
            throw TuwenError("gallery: its vectors are of model \(header.fingerprint), this one is \(expected): export it again")
        }
        (names, dimension, fingerprint) = (header.names, width, header.fingerprint)
        let start = data.startIndex + header.bodyStart + tensor.offsets[0]
        embeds = Self.floats(data[start..<(start + rows * width * 4)])
    }

    /// The `limit` nearest pictures, nearest first; of equals the one that comes first in the gallery.
    /// - Parameter embeds: of unit length, from either encoder.
    public func search(_ query: [Float], limit: Int) throws -> [Match] {
        guard query.count == dimension else {
            throw TuwenError("query of \(query.count) numbers, the gallery has \(dimension)")
        }
        let cosines = (0..<names.count).map { row in cosine(of: row, with: query) }
        let order = cosines.indices.sorted { (cosines[$0], $1) > (cosines[$1], $0) }
        return order.prefix(max(0, limit)).map { Match(name: names[$0], cosine: cosines[$0]) }
    }

    private func cosine(of row: Int, with query: [Float]) -> Float {
        embeds.withUnsafeBufferPointer { rows in
            var sum: Float = 0
            let start = row * dimension
            for index in 0..<dimension { sum += rows[start + index] * query[index] }
            return sum
        }
    }

    // MARK: - The file

    private struct Tensor: Decodable {
        let dtype: String
        let shape: [Int]
        let offsets: [Int]

        enum CodingKeys: String, CodingKey {
            case dtype, shape
            case offsets = "data_offsets"
        }
    }

    private struct Header: Decodable {
        let tensor: Tensor?
        let metadata: [String: String]

        enum CodingKeys: String, CodingKey {
            case tensor = "image_embeds"
            case metadata = "__metadata__"
        }
    }

    private static let maxHeaderSize = 64 << 20

    private static func header(
        of data: Data
    ) throws -> (tensor: Tensor?, names: [String], fingerprint: String, bodyStart: Int) {
        let sizeBytes = data.prefix(8)
        let size = sizeBytes.reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard sizeBytes.count == 8, size <= UInt64(min(maxHeaderSize, max(0, data.count - 8))) else {
            throw TuwenError("gallery: not a safetensors file, or not the whole of it")
        }
        let end = data.startIndex + 8 + Int(size)
        guard let header = try? JSONDecoder().decode(Header.self, from: data[(data.startIndex + 8)..<end]),
            let names = header.metadata["names"], let fingerprint = header.metadata["fingerprint"],
            let decoded = try? JSONDecoder().decode([String].self, from: Data(names.utf8))
        else { throw TuwenError("gallery: its header has no names and fingerprint, as tuwen export gallery writes them") }
        return (header.tensor, decoded, fingerprint, 8 + Int(size))
    }

    /// Little-endian, wherever they lie.
    private static func floats(_ bytes: Data) -> [Float] {
        bytes.withUnsafeBytes { raw in
            (0..<(raw.count / 4)).map { index in
                Float(bitPattern: UInt32(littleEndian: raw.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self)))
            }
        }
    }
}
