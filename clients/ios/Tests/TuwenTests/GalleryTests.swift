import XCTest

@testable import Tuwen

final class GalleryTests: XCTestCase {
    func testTheNearestComeFirstAndOfEqualsTheFirst() throws {
        let gallery = try Gallery(safetensors: resource("gallery.safetensors"))
        XCTAssertEqual(gallery.names, ["红苹果", "绿苹果", "红心", "红心 2"])
        let matches = try gallery.search([1, 0, 0], limit: 3)
        XCTAssertEqual(matches.map(\.name), ["红心", "红心 2", "红苹果"])
        XCTAssertEqual(matches[2].cosine, 0.8, accuracy: 1e-6)
        XCTAssertEqual(try gallery.search([1, 0, 0], limit: 99).count, 4)
    }

    func testWhatDoesNotFitIsRefused() throws {
        let file = try resource("gallery.safetensors")
        XCTAssertNoThrow(try Gallery(safetensors: file, fingerprint: "9223372036854775807"))
        XCTAssertThrowsError(try Gallery(safetensors: file, fingerprint: "1"))
        XCTAssertThrowsError(try Gallery(safetensors: file).search([1, 0], limit: 1))
        for length in [0, 7, 8, 40, file.count - 1] {
            XCTAssertThrowsError(try Gallery(safetensors: file.prefix(length)), "\(length) bytes")
        }
        var huge = file
        huge.replaceSubrange(0..<8, with: Array(repeating: 0xFF, count: 8))
        XCTAssertThrowsError(try Gallery(safetensors: huge))
    }
}
