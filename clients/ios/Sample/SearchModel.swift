import Foundation
import Tuwen

/// What the search box asks, and what it gets.
@MainActor
final class SearchModel: ObservableObject {
    @Published private(set) var matches: [Gallery.Match] = []
    @Published private(set) var message: String?

    private struct Parts: Sendable {
        let encoder: TextEncoder
        let gallery: Gallery
    }

    private var loading: Task<Parts, Error>?
    private var searching: Task<Void, Never>?

    /// The newest query wins: an older one that is still computed is not shown.
    func search(_ text: String) {
        searching?.cancel()
        guard !text.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty else {
            (matches, message) = ([], nil)
            return
        }
        let parts = loading ?? Task.detached(priority: .userInitiated) { try Self.load() }
        loading = parts
        searching = Task {
            let answer = await Task.detached(priority: .userInitiated) {
                await Result { () async throws -> [Gallery.Match] in
                    let parts = try await parts.value
                    return try parts.gallery.search(parts.encoder.encode(text), limit: 24)
                }
            }.value
            guard !Task.isCancelled else { return }
            switch answer {
            case .success(let found): (matches, message) = (found, nil)
            case .failure(let error): (matches, message) = ([], "\(error)")
            }
        }
    }

    /// A second or so at the first query: Core ML prepares the model for this device.
    private nonisolated static func load() throws -> Parts {
        let card = try ModelCard(json: Data(contentsOf: resource("model", "json")))
        let encoder = try TextEncoder(
            compiledModel: resource(card.text.compiledName, "mlmodelc"), vocabulary: Data(contentsOf: resource("vocab", "txt")),
            card: card)
        let gallery = try Gallery(
            safetensors: Data(contentsOf: resource("gallery", "safetensors")), fingerprint: card.fingerprint)
        return Parts(encoder: encoder, gallery: gallery)
    }

    private nonisolated static func resource(_ name: String, _ kind: String) throws -> URL {
        guard let url = Bundle.main.url(forResource: name, withExtension: kind) else {
            throw TuwenError("\(name).\(kind) is not in the app: drag what tuwen export wrote into Xcode")
        }
        return url
    }
}

extension Result where Failure == Error {
    fileprivate init(_ body: () async throws -> Success) async {
        do { self = .success(try await body()) } catch { self = .failure(error) }
    }
}
