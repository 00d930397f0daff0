#if canImport(CoreML)
import CoreML
import Foundation

/// Chinese text -> a vector of unit length, by the Core ML text tower.
public final class TextEncoder: @unchecked Sendable {  // MLModel predicts from any thread
    private let model: MLModel
    private let tokenizer: WordPieceTokenizer
    private let card: ModelCard

    /// - Parameters:
    ///   - compiledModel: the `.mlmodelc` that Xcode makes of the text tower's package, `card.text.compiledName`.
    ///   - computeUnits: `.all` lets Core ML choose among processor, graphics and Neural Engine.
    public init(compiledModel: URL, vocabulary: Data, card: ModelCard, computeUnits: MLComputeUnits = .all) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        model = try MLModel(contentsOf: compiledModel, configuration: configuration)
        tokenizer = try WordPieceTokenizer(vocabulary: vocabulary)
        self.card = card
    }

    /// - Throws: `TuwenError` for a text that is blank or too long; whatever Core ML throws.
    public func encode(_ text: String) throws -> [Float] {
        let encoding = try tokenizer.encode(text, contextLength: card.contextLength)
        let padded = try tokenizer.pad(encoding.inputIDs, toOneOf: card.textBuckets)
        let inputIDs = try MLMultiArray(shape: [1, NSNumber(value: padded.count)], dataType: .int32)
        for (index, id) in padded.enumerated() { inputIDs[index] = NSNumber(value: id) }
        let input = try MLDictionaryFeatureProvider(dictionary: ["input_ids": MLFeatureValue(multiArray: inputIDs)])
        return try vector(named: "text_embeds", of: model.prediction(from: input))
    }
}

/// The numbers of an output, whichever precision it has.
func vector(named name: String, of output: MLFeatureProvider) throws -> [Float] {
    guard let array = output.featureValue(for: name)?.multiArrayValue else {
        throw TuwenError("the model has no output \(name): it is not one that tuwen export coreml wrote")
    }
    return (0..<array.count).map { array[$0].floatValue }
}
#endif
