import Foundation

/// Chinese text -> input_ids, with the very ids of the checkpoint's training.
///
///     let tokenizer = try WordPieceTokenizer(vocabulary: Data(contentsOf: url))
///     tokenizer.encode("一只猫").inputIDs   // [101, 671, 1372, 4344, 102]
public struct WordPieceTokenizer: Sendable {
    public struct Encoding: Equatable, Sendable {
        /// [CLS], the word pieces, [SEP]; no padding.
        public let inputIDs: [Int32]
        /// Whether the text had to be cut.
        public let isTruncated: Bool
    }

    /// The longest text that is looked at, in Unicode scalars; nobody's query is longer.
    public static let maxTextLength = 4096
    private static let maxWordLength = 200
    private static let padID: Int32 = 0, unknownID: Int32 = 100, startID: Int32 = 101, endID: Int32 = 102

    private let ids: [[UInt8]: Int32]
    private let longestPiece: Int

    /// - Parameter vocabulary: `vocab.txt`, one token a line.
    /// - Throws: `TuwenError` where it is no vocabulary of Chinese-CLIP.
    public init(vocabulary: Data) throws {
        var ids: [[UInt8]: Int32] = [:]
        // By the byte, as other line separators than \n are tokens; a file that ends in \n has no line behind it.
        var lines = vocabulary.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        if lines.last?.isEmpty == true { lines.removeLast() }
        for (index, line) in lines.enumerated() {
            ids[Self.trimmed(line)] = Int32(index)
        }
        for (token, id) in [("[PAD]", Self.padID), ("[UNK]", Self.unknownID), ("[CLS]", Self.startID), ("[SEP]", Self.endID)]
        where ids[Array(token.utf8)] != id {
            throw TuwenError("vocabulary of \(lines.count) lines: \(token) is not token \(id), as in Chinese-CLIP's vocab.txt")
        }
        self.ids = ids
        longestPiece = ids.keys.map(\.count).max() ?? 0
    }

    /// - Parameter contextLength: the most tokens, [CLS] and [SEP] among them.
    /// - Throws: `TuwenError` for a text that is blank or too long.
    public func encode(_ text: String, contextLength: Int = 52) throws -> Encoding {
        guard text.unicodeScalars.contains(where: { !Self.isSpace($0) }) else {
            throw TuwenError("text is empty, expected at least one character")
        }
        let length = text.unicodeScalars.count
        guard length <= Self.maxTextLength else {
            throw TuwenError("text has \(length) characters, the limit is \(Self.maxTextLength)")
        }
        let words = BasicTokenizer.words(of: BasicTokenizer.normalize(text))
        let room = max(0, contextLength - 2)
        let pieces = words.prefix(room).flatMap(pieces)
        return Encoding(
            inputIDs: [Self.startID] + pieces.prefix(room) + [Self.endID],
            isTruncated: words.count > room || pieces.count > room
        )
    }

    /// input_ids filled up with [PAD] to the smallest of `lengths` that holds them.
    public func pad(_ inputIDs: [Int32], toOneOf lengths: [Int]) throws -> [Int32] {
        guard let length = lengths.filter({ $0 >= inputIDs.count }).min() else {
            throw TuwenError("\(inputIDs.count) tokens, the model takes \(lengths.max() ?? 0) at most")
        }
        return inputIDs + Array(repeating: Self.padID, count: length - inputIDs.count)
    }

    /// The longest piece that fits, again and again; a word with a part that the vocabulary does not know is [UNK].
    private func pieces(of word: BasicTokenizer.Word) -> [Int32] {
        guard word.count <= Self.maxWordLength else { return [Self.unknownID] }
        let bytes = word.map { Array(String($0).utf8) }
        var found: [Int32] = []
        var start = 0
        while start < word.count {
            guard let (id, end) = longestMatch(bytes, from: start) else { return [Self.unknownID] }
            found.append(id)
            start = end
        }
        return found
    }

    private func longestMatch(_ scalars: [[UInt8]], from start: Int) -> (Int32, Int)? {
        var candidate = start == 0 ? [] : Array("##".utf8)
        var best: (Int32, Int)?
        for end in start..<scalars.count {
            candidate += scalars[end]
            guard candidate.count <= longestPiece else { break }
            if let id = ids[candidate] { best = (id, end + 1) }
        }
        return best
    }

    /// Without the white space around it, as the vocabulary is read in training.
    private static func trimmed(_ line: Data.SubSequence) -> [UInt8] {
        let scalars = Array(String(decoding: line, as: UTF8.self).unicodeScalars)
        guard let first = scalars.firstIndex(where: { !isSpace($0) }), let last = scalars.lastIndex(where: { !isSpace($0) })
        else { return [] }
        return scalars[first...last].flatMap { Array(String($0).utf8) }
    }

    /// Python counts four separators among the control characters as white space, too.
    private static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
    }
}
