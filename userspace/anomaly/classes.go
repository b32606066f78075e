// SPDX-License-Identifier: Apache-2.0

package anomaly

// Symbols: what of a byte is counted by presence. Letters and digits are one
// each, every ASCII punctuation mark is its own.
const (
	symbolLower = iota
	symbolUpper
	symbolDigit
	symbolSpace
	symbolHigh     // not ASCII
	symbolControl  // including NUL and line ends
	symbolNeedless // an unreserved character that came percent-encoded
	symbolPunctuation
	symbolCount = symbolPunctuation + 32
)

// Classes: what pairs are made of. The edge is before the first and after
// the last byte.
const (
	classEdge = iota
	classLetter
	classDigit
	classSpace
	classSoft // . , - _ : and /
	classHard // other punctuation, control characters
	classHigh
	classCount
)

const maxTokens = 64 // of a shape

type class struct {
	symbol, class, token uint8
}

var (
	classes [256]class
	unhex   [256]uint8
)

func init() {
	next := uint8(symbolPunctuation)
	for i := range 256 {
		c := byte(i)
		k := class{symbolPunctuation, classHard, 0}
		switch {
		case 'a' <= c && c <= 'z':
			k = class{symbolLower, classLetter, 1}
		case 'A' <= c && c <= 'Z':
			k = class{symbolUpper, classLetter, 1}
		case '0' <= c && c <= '9':
			k = class{symbolDigit, classDigit, 2}
		case c == ' ':
			k = class{symbolSpace, classSpace, 3}
		case c >= 0x80: // letters of other scripts keep the shape of a word
			k = class{symbolHigh, classHigh, 1}
		case c < 0x20 || c == 0x7f:
			k = class{symbolControl, classHard, 4}
		default:
			k = class{next, classHard, next}
			switch c {
			case '.', ',', '-', '_', ':', '/':
				k.class = classSoft
			}
			next++
		}
		classes[i] = k
		unhex[i] = 0xff
		switch {
		case '0' <= c && c <= '9':
			unhex[i] = c - '0'
		case 'a' <= c && c <= 'f':
			unhex[i] = c - 'a' + 10
		case 'A' <= c && c <= 'F':
			unhex[i] = c - 'A' + 10
		}
	}
}
