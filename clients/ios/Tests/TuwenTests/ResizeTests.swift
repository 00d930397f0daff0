import XCTest

@testable import Tuwen

final class ResizeTests: XCTestCase {
    private struct Vector: Decodable {
        let width: Int
        let height: Int
        let channels: Int
        let side: Int
        let fnv1a: String
    }

    func testPixelsAreThoseOfPillow() throws {
        let vectors = try JSONDecoder().decode([Vector].self, from: resource("resize_vectors.json"))
        XCTAssertGreaterThan(vectors.count, 10)
        for vector in vectors {
            let pixels = Self.noise(vector.width * vector.height * vector.channels)
            let resized = BicubicResize.resize(
                pixels, width: vector.width, height: vector.height, channels: vector.channels, side: vector.side)
            XCTAssertEqual(resized.count, vector.side * vector.side * vector.channels)
            XCTAssertEqual(Self.fnv1a(resized), vector.fnv1a, "\(vector)")
        }
    }

    /// The same bytes in builders/ios_vectors.py.
    private static func noise(_ count: Int) -> [UInt8] {
        var state: UInt32 = 1
        return (0..<count).map { _ in
            state = state &* 1_664_525 &+ 1_013_904_223
            return UInt8(state >> 24)
        }
    }

    private static func fnv1a(_ bytes: [UInt8]) -> String {
        var hash: UInt64 = 0xCBF2_9CE4_8422_2325
        for byte in bytes { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
        return String(hash, radix: 16)
    }
}
