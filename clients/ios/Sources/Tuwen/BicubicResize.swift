/// 8-bit pixels -> R x R, as the checkpoint's training resized: Pillow's antialiased bicubic, to the bit.
///
/// Apple's own scalers use other kernels; what a model has been trained on costs no more. Aspect ratio is not kept, as in
/// Chinese-CLIP. Source of the arithmetic: Pillow's src/libImaging/Resample.c (kernel with a = -0.5, support widened by
/// the scale, weights of 22 bits, rows first and rounded to 8 bits before columns).
enum BicubicResize {
    private static let weightBits = 32 - 8 - 2

    /// - Parameter pixels: row by row, `channels` bytes a pixel.
    /// - Returns: side x side pixels of as many channels.
    static func resize(_ pixels: [UInt8], width: Int, height: Int, channels: Int, side: Int) -> [UInt8] {
        let columns = windows(from: width, to: side)
        let rows = windows(from: height, to: side)
        // Like Pillow: a side that has the right size is not touched.
        let narrow = width == side
            ? pixels : pass(pixels, lines: height, windows: columns, step: channels, lineStep: width * channels,
                            outStep: channels, outLineStep: side * channels, channels: channels, side: side)
        return height == side
            ? narrow : pass(narrow, lines: side, windows: rows, step: side * channels, lineStep: channels,
                            outStep: side * channels, outLineStep: channels, channels: channels, side: side)
    }

    private struct Window {
        let first: Int
        let weights: [Int32]
    }

    private static func windows(from size: Int, to side: Int) -> [Window] {
        let scale = Double(size) / Double(side)
        let filterScale = max(scale, 1)
        let support = 2 * filterScale
        return (0..<side).map { position in
            let center = (Double(position) + 0.5) * scale
            let first = max(0, Int(center - support + 0.5))
            let end = min(size, Int(center + support + 0.5))
            let raw = (first..<end).map { kernel((Double($0) - center + 0.5) / filterScale) }
            let sum = raw.reduce(0, +)
            return Window(first: first, weights: raw.map { fixed(sum == 0 ? $0 : $0 / sum) })
        }
    }

    private static func fixed(_ weight: Double) -> Int32 {
        Int32(weight * Double(1 << weightBits) + (weight < 0 ? -0.5 : 0.5))
    }

    private static func kernel(_ x: Double) -> Double {
        let a = -0.5
        let x = abs(x)
        if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
        if x < 2 { return (((x - 5) * x + 8) * x - 4) * a }
        return 0
    }

    /// Along rows or along columns, by the steps between neighbours.
    private static func pass(
        _ pixels: [UInt8], lines: Int, windows: [Window], step: Int, lineStep: Int, outStep: Int, outLineStep: Int,
        channels: Int, side: Int
    ) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: lines * side * channels) { out, count in
            pixels.withUnsafeBufferPointer { source in
                for (position, window) in windows.enumerated() {
                    for line in 0..<lines {
                        for channel in 0..<channels {
                            var sum = Int32(1) << (weightBits - 1)
                            var index = line * lineStep + window.first * step + channel
                            for weight in window.weights {
                                sum &+= Int32(source[index]) &* weight
                                index += step
                            }
                            out[line * outLineStep + position * outStep + channel] = UInt8(clamping: sum >> weightBits)
                        }
                    }
                }
            }
            count = lines * side * channels
        }
    }
}
