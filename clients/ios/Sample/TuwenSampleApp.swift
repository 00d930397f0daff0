import SwiftUI

/// A search box over the pictures that the app carries. docs/coreml.md says how to put it together in Xcode.
@main
struct TuwenSampleApp: App {
    var body: some Scene {
        WindowGroup {
            SearchView(model: SearchModel())
        }
    }
}
