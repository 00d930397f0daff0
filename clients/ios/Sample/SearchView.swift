import SwiftUI
import Tuwen

struct SearchView: View {
    @StateObject var model: SearchModel
    @State private var query = ""

    private let columns = [GridItem(.adaptive(minimum: 96), spacing: 12)]

    var body: some View {
        NavigationStack {
            ScrollView {
                if let message = model.message {
                    Text(message).foregroundStyle(.secondary).padding()
                }
                LazyVGrid(columns: columns, spacing: 12) {
                    // By rank: two pictures of a gallery may have one name.
                    ForEach(Array(model.matches.enumerated()), id: \.offset) { _, match in
                        Picture(match: match)
                    }
                }
                .padding()
            }
            .navigationTitle("图文")
            .searchable(text: $query, prompt: "戴墨镜的笑脸")
            .onChange(of: query) { text in model.search(text) }
        }
    }
}

private struct Picture: View {
    let match: Gallery.Match

    var body: some View {
        VStack {
            if let image = UIImage(named: match.name) {
                Image(uiImage: image).resizable().scaledToFit()
            } else {
                Image(systemName: "photo").imageScale(.large).foregroundStyle(.secondary)
            }
            Text(match.cosine, format: .number.precision(.fractionLength(2)))
                .font(.caption).foregroundStyle(.secondary)
        }
        .accessibilityElement(children: .ignore)
        .accessibilityLabel("\(match.name), \(Int(match.cosine * 100))%")
    }
}
