import Foundation

/// Text -> words, single ideographs and single punctuation marks: BERT's basic tokenisation, lower-casing.
///
/// Scalar by scalar, as `tuwen/tokenizer.py` does; Swift's own characters and its equality of strings would join what
/// the vocabulary keeps apart.
enum BasicTokenizer {
    typealias Word = [Unicode.Scalar]

    /// The published normalisation: lower case, curly quotes to straight ones.
    static func normalize(_ text: String) -> [Unicode.Scalar] {
        lowercase(Array(text.unicodeScalars)).map { $0 == "\u{201C}" || $0 == "\u{201D}" ? "\"" : $0 }
    }

    static func words(of text: [Unicode.Scalar]) -> [Word] {
        split(clean(text)).flatMap { word in
            var separated: [Unicode.Scalar] = []
            for scalar in decompose(lowercase(word)) {
                if isPunctuation(scalar) {
                    separated += [" ", scalar, " "]
                } else if scalar.properties.generalCategory != .nonspacingMark {  // accents
                    separated.append(scalar)
                }
            }
            return split(separated)
        }
    }

    /// Control characters vanish, white space becomes a space, ideographs stand alone.
    private static func clean(_ text: [Unicode.Scalar]) -> [Unicode.Scalar] {
        var cleaned: [Unicode.Scalar] = []
        for scalar in text {
            let category = scalar.properties.generalCategory
            if scalar == "\t" || scalar == "\n" || scalar == "\r" || category == .spaceSeparator {
                cleaned.append(" ")
            } else if scalar == "\0" || scalar == "\u{FFFD}" || category == .control || category == .format {
                continue
            } else if isIdeograph(scalar) {
                cleaned += [" ", scalar, " "]
            } else {
                cleaned.append(scalar)
            }
        }
        return cleaned
    }

    /// At white space; of all that Python splits at, only these are left after cleaning.
    private static func split(_ scalars: [Unicode.Scalar]) -> [Word] {
        scalars.split { $0 == " " || $0 == "\u{2028}" || $0 == "\u{2029}" }.map(Array.init)
    }

    private static func decompose(_ scalars: [Unicode.Scalar]) -> [Unicode.Scalar] {
        var text = String.UnicodeScalarView()
        text.append(contentsOf: scalars)
        return Array(String(text).decomposedStringWithCanonicalMapping.unicodeScalars)
    }

    /// As Python's `str.lower`: Swift's own does not know that a sigma at the end of a word has a form of its own.
    static func lowercase(_ scalars: [Unicode.Scalar]) -> [Unicode.Scalar] {
        var lowered: [Unicode.Scalar] = []
        lowered.reserveCapacity(scalars.count)
        for (index, scalar) in scalars.enumerated() {
            if scalar == "\u{3A3}" {
                lowered.append(isFinal(index, in: scalars) ? "\u{3C2}" : "\u{3C3}")
            } else {
                lowered += scalar.properties.lowercaseMapping.unicodeScalars
            }
        }
        return lowered
    }

    /// A cased letter before it and none behind, apostrophes and accents aside. Source: Unicode 3.13, Final_Sigma.
    private static func isFinal(_ index: Int, in scalars: [Unicode.Scalar]) -> Bool {
        let before = scalars[..<index].last { !$0.properties.isCaseIgnorable }
        let behind = scalars[(index + 1)...].first { !$0.properties.isCaseIgnorable }
        return before?.properties.isCased == true && behind?.properties.isCased != true
    }

    /// Every ASCII character that is neither letter nor digit counts, "$" and "^" too.
    private static func isPunctuation(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.value {
        case 33...47, 58...64, 91...96, 123...126: return true
        default: break
        }
        switch scalar.properties.generalCategory {
        case .connectorPunctuation, .dashPunctuation, .openPunctuation, .closePunctuation, .initialPunctuation,
            .finalPunctuation, .otherPunctuation:
            return true
        default: return false
        }
    }

    /// The blocks that BERT separates by spaces. Source: google-research/bert, tokenization.py.
    private static func isIdeograph(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.value {
        case 0x4E00...0x9FFF, 0x3400...0x4DBF, 0x20000...0x2A6DF, 0x2A700...0x2B73F, 0x2B740...0x2B81F,
            0x2B820...0x2CEAF, 0xF900...0xFAFF, 0x2F800...0x2FA1F:
            return true
        default: return false
        }
    }
}
