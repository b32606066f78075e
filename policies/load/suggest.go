// SPDX-License-Identifier: Apache-2.0

package load

import (
	"slices"
	"strings"
)

// Hint is a name that may have been meant; the zero Hint is none.
type Hint struct{ Name, quote string }

// String writes ` (did you mean QxQ?)`, Q being the quote, and "" for none.
func (h Hint) String() string {
	if h.Name == "" {
		return ""
	}
	return " (did you mean " + h.quote + h.Name + h.quote + "?)"
}

// DidYouMean returns the candidate that is nearest to a name, none where none
// is near.
func DidYouMean(name string, candidates []string, quote string) Hint {
	return Hint{nearest(name, candidates), quote}
}

// Perhaps is the hint at one name.
func Perhaps(name string) Hint { return Hint{name, `"`} }

// nearest returns the candidate with the smallest edit distance, at most a
// third of the name's length and at least 1; the alphabetically first of
// equals.
func nearest(name string, candidates []string) string {
	const longest = 64 // what a human would mistype
	if name == "" || len(name) > longest {
		return ""
	}
	best, distance := "", max(1, len(name)/3)+1
	for _, c := range slices.Sorted(slices.Values(candidates)) {
		if len(c) > longest || c == name {
			continue
		}
		d := editDistance(strings.ToLower(name), strings.ToLower(c), distance)
		if d < distance {
			best, distance = c, d
		}
	}
	return best
}

// editDistance counts insertions, deletions, substitutions and swaps of
// neighbours (optimal string alignment), or returns limit where there are
// at least that many.
func editDistance(a, b string, limit int) int {
	if d := len(a) - len(b); d >= limit || -d >= limit {
		return limit
	}
	two := make([]int, len(b)+1)
	prev := make([]int, len(b)+1)
	row := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(prev[j]+1, row[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], two[j-2]+1)
			}
		}
		two, prev, row = prev, row, two
	}
	return min(prev[len(b)], limit)
}
