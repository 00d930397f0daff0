#if canImport(CoreML) && canImport(CoreGraphics)
import CoreGraphics
import CoreML
import CoreVideo
import Foundation

/// A picture -> a vector of unit length, by the Core ML image tower, whose graph normalises the pixels itself.
public final class ImageEncoder: @unchecked Sendable {  // MLModel predicts from any thread
    private let model: MLModel
    private let card: ModelCard

    /// - Parameter compiledModel: the `.mlmodelc` that Xcode makes of the image tower's package, `card.image.compiledName`.
    public init(compiledModel: URL, card: ModelCard, computeUnits: MLComputeUnits = .all) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        model = try MLModel(contentsOf: compiledModel, configuration: configuration)
        self.card = card
    }

    /// - Throws: `TuwenError` for a picture of no or too many pixels; whatever Core ML throws.
    public func encode(_ image: CGImage) throws -> [Float] {
        let pixels = try Self.pixels(of: image)
        let side = card.resolution
        let resized = BicubicResize.resize(pixels, width: image.width, height: image.height, channels: 4, side: side)
        let buffer = try Self.pixelBuffer(of: resized, side: side)
        let input = try MLDictionaryFeatureProvider(dictionary: ["image": MLFeatureValue(pixelBuffer: buffer)])
        return try vector(named: "image_embeds", of: model.prediction(from: input))
    }

    /// As many as the server takes.
    private static let maxPixels = 64_000_000

    /// BGRA, at the picture's own size. On black where it is transparent: Core Graphics keeps no colour there, where the
    /// server drops the transparency alone.
    private static func pixels(of image: CGImage) throws -> [UInt8] {
        let (width, height) = (image.width, image.height)
        guard width > 0, height > 0, width <= maxPixels / height else {
            throw TuwenError("picture of \(width) x \(height) pixels, the limit is \(maxPixels) in all")
        }
        var pixels = [UInt8](repeating: 0, count: width * height * 4)
        let layout = CGImageAlphaInfo.noneSkipFirst.rawValue | CGBitmapInfo.byteOrder32Little.rawValue
        // The picture's own colours where they are RGB, so that nothing is converted: neither is it in training.
        let ownSpace = image.colorSpace.flatMap { $0.model == .rgb ? $0 : nil }
        try pixels.withUnsafeMutableBytes { bytes in
            guard let space = ownSpace ?? CGColorSpace(name: CGColorSpace.sRGB),
                let context = CGContext(
                    data: bytes.baseAddress, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
                    space: space, bitmapInfo: layout)
            else { throw TuwenError("picture of \(width) x \(height) pixels cannot be drawn") }
            context.draw(image, in: CGRect(x: 0, y: 0, width: width, height: height))
        }
        return pixels
    }

    private static func pixelBuffer(of pixels: [UInt8], side: Int) throws -> CVPixelBuffer {
        var created: CVPixelBuffer?
        let status = CVPixelBufferCreate(kCFAllocatorDefault, side, side, kCVPixelFormatType_32BGRA, nil, &created)
        guard status == kCVReturnSuccess, let buffer = created else {
            throw TuwenError("no memory for a picture of \(side) x \(side) pixels (\(status))")
        }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else { throw TuwenError("a pixel buffer without memory") }
        let bytesPerRow = CVPixelBufferGetBytesPerRow(buffer)
        pixels.withUnsafeBytes { source in
            for row in 0..<side {
                base.advanced(by: row * bytesPerRow)
                    .copyMemory(from: source.baseAddress!.advanced(by: row * side * 4), byteCount: side * 4)
            }
        }
        return buffer
    }
}
#endif
