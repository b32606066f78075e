// SPDX-License-Identifier: Apache-2.0

// Package library holds example policies to start from. Each folder is a
// whole set, as it would lie in the policy folder; tests load every one and
// hold its decisions against what its comments say.
package library

import (
	"embed"
	"io/fs"
	"path"
	"slices"

	"github.com/sallyport-dev/sallyport/policies/load"
)

//go:embed */*.yaml */*.fga
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

// Files returns an example's files, by the names that a policy folder would
// give them.
func Files(name string) ([]load.File, error) {
	entries, err := fs.ReadDir(examples, name)
	if err != nil {
		return nil, err
	}
	var files []load.File
	for _, e := range entries {
		content, err := fs.ReadFile(examples, path.Join(name, e.Name()))
		if err != nil {
			return nil, err
		}
		files = append(files, load.File{Path: e.Name(), Content: content})
	}
	return files, nil
}
