// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "Tuwen",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "Tuwen", targets: ["Tuwen"])],
    targets: [
        .target(name: "Tuwen"),
        .testTarget(name: "TuwenTests", dependencies: ["Tuwen"], resources: [.copy("Resources")]),
    ]
)
