// SPDX-License-Identifier: Apache-2.0

// Package library holds example policies to start from. Each folder is a
// whole set, as it would lie in the policy folder, with its tests and a page
// that says what it is for.
package library

import (
	"embed"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/load"
)

//go:embed */*.yaml */*.fga */README.md
var examples embed.FS

// Names returns the examples' names, sorted.
func Names() []string {
	entries, err := fs.ReadDir(examples, ".")
	if err != nil {
		panic("library: the embedded folder cannot be listed: " + err.Error())
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return slices.Sorted(slices.Values(names))
}

// Files returns an example's files, by the names that a folder would give
// them: policies, what belongs to them, tests and README.md. It fails with
// fs.ErrNotExist.
func Files(name string) ([]load.File, error) {
	entries, err := fs.ReadDir(examples, name)
	if err != nil {
		return nil, fmt.Errorf("read example: %w", err)
	}
	var files []load.File
	for _, e := range entries {
		content, err := fs.ReadFile(examples, path.Join(name, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("read example: %w", err)
		}
		files = append(files, load.File{Path: e.Name(), Content: content})
	}
	return files, nil
}

// Summary returns what the example is for: what its page says up to the first
// stop or colon.
func Summary(name string) string {
	page, err := fs.ReadFile(examples, path.Join(name, "README.md"))
	if err != nil {
		return ""
	}
	_, text, _ := strings.Cut(string(page), "\n\n")
	paragraph, _, _ := strings.Cut(text, "\n\n")
	sentence, _, _ := strings.Cut(strings.Join(strings.Fields(paragraph), " "), ". ")
	sentence, _, _ = strings.Cut(sentence, ": ")
	return strings.TrimSuffix(sentence, ".")
}
