import XCTest

@testable import Tuwen

final class TokenizerTests: XCTestCase {
    private struct Vector: Decodable {
        let text: String
        let input_ids: [Int32]
        let truncated: Bool
    }

    func testEveryLineHasTheIdsThatPythonGivesIt() throws {
        let tokenizer = try WordPieceTokenizer(vocabulary: vocabulary())
        let vectors = try JSONDecoder().decode([Vector].self, from: resource("tokenizer_vectors.json"))
        XCTAssertEqual(vectors.count, 1000)
        for vector in vectors {
            let encoding = try tokenizer.encode(vector.text)
            XCTAssertEqual(encoding.inputIDs, vector.input_ids, vector.text.debugDescription)
            XCTAssertEqual(encoding.isTruncated, vector.truncated, vector.text.debugDescription)
        }
    }

    func testBlankAndEndlessTextsAreRefused() throws {
        let tokenizer = try WordPieceTokenizer(vocabulary: vocabulary())
        for text in ["", " \u{3000}\n", String(repeating: "长", count: 4097)] {
            XCTAssertThrowsError(try tokenizer.encode(text)) { XCTAssertTrue($0 is TuwenError) }
        }
        XCTAssertEqual(try tokenizer.encode(String(repeating: "长", count: 4096)).inputIDs.count, 52)
    }

    func testPaddingGoesToTheSmallestLengthThatHolds() throws {
        let tokenizer = try WordPieceTokenizer(vocabulary: vocabulary())
        XCTAssertEqual(try tokenizer.pad([101, 671, 102], toOneOf: [52, 4, 16]), [101, 671, 102, 0])
        XCTAssertThrowsError(try tokenizer.pad(Array(repeating: 5, count: 53), toOneOf: [8, 52]))
    }

    func testAnotherVocabularyIsRefused() {
        XCTAssertThrowsError(try WordPieceTokenizer(vocabulary: Data("a\nb\n".utf8)))
    }
}
