import XCTest

@testable import Tuwen

final class ModelCardTests: XCTestCase {
    func testWhatTheExportWritesIsRead() throws {
        let card = try ModelCard(json: resource("model.json"))
        XCTAssertGreaterThan(card.resolution, 0)
        XCTAssertGreaterThan(card.embedDim, 0)
        XCTAssertEqual(card.textBuckets, card.textBuckets.sorted())
        XCTAssertEqual(card.textBuckets.last, card.contextLength)
        XCTAssertNotNil(UInt64(card.fingerprint))
        XCTAssertEqual(card.text.compiledName, "tiny_rn_text")
    }

    func testAnotherFileIsRefused() {
        XCTAssertThrowsError(try ModelCard(json: Data("{}".utf8))) { XCTAssertTrue($0 is TuwenError) }
    }
}
