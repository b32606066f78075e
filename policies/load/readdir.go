// SPDX-License-Identifier: Apache-2.0

package load

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// ErrChanging is what ReadDir returns for a folder that would not hold still
// while it was read.
var ErrChanging = errors.New("the folder changes while it is read")

// ReadDir reads the policy files of a folder, by name: *.yaml, *.yml and the
// models *.fga and *.fga.json, without tests (*_test.yaml) and hidden files.
// The paths of the files are their names. Symbolic links are followed within
// the folder, as ConfigMap volumes need it, and never out of it; what is not
// a regular file of at most MaxFileBytes is a problem. The files are of one
// moment, or the error is ErrChanging.
func ReadDir(dir string) ([]File, []Problem, error) { return readDir(dir, IsPolicyFile) }

// ReadTests reads the tests of a folder (*_test.yaml, *_test.yml), otherwise
// as ReadDir does its policies.
func ReadTests(dir string) ([]File, []Problem, error) { return readDir(dir, IsTestFile) }

func readDir(dir string, wanted func(name string) bool) ([]File, []Problem, error) {
	const attempts = 5
	for range attempts {
		files, problems, same, err := readOnce(dir, wanted)
		if err != nil {
			return nil, nil, err
		}
		if same {
			return files, problems, nil
		}
	}
	return nil, nil, fmt.Errorf("read %s: %w", dir, ErrChanging)
}

func readOnce(dir string, wanted func(string) bool) (files []File, problems []Problem, same bool, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, false, fmt.Errorf("open policy folder: %w", err)
	}
	defer root.Close()
	before, err := snapshot(root, wanted)
	if err != nil {
		return nil, nil, false, err
	}
	total := 0
	for i, s := range before {
		if i == MaxFiles {
			problems = append(problems, Problem{Message: fmt.Sprintf("the folder has more than %d policy files", MaxFiles)})
			break
		}
		content, err := readFile(root, s.name)
		if err != nil {
			problems = append(problems, Problem{Position: Position{File: s.name}, Message: err.Error()})
			continue
		}
		if total += len(content); total > MaxSetBytes {
			problems = append(problems, Problem{Position: Position{File: s.name}, Message: fmt.Sprintf("the set is larger than %d MiB", MaxSetBytes>>20)})
			break
		}
		files = append(files, File{Path: s.name, Content: content})
		if s.mode&0o002 != 0 {
			problems = append(problems, Problem{Position: Position{File: s.name}, Severity: Warning,
				Message: "every user of this machine may write to the file; chmod o-w it"})
		}
	}
	after, err := snapshot(root, wanted)
	if err != nil {
		return nil, nil, false, err
	}
	return files, problems, slices.Equal(before, after), nil
}

// maxNames bounds what is listed of a folder, whatever it is.
const maxNames = 4 * MaxFiles

// stamp tells one state of a file from another.
type stamp struct {
	name        string
	inode       uint64
	size        int64
	mtime       int64
	ctime       int64
	mode        fs.FileMode
	unreachable bool
}

func snapshot(root *os.Root, wanted func(string) bool) ([]stamp, error) {
	d, err := root.Open(".")
	if err != nil {
		return nil, fmt.Errorf("open policy folder: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(maxNames)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("list policy folder: %w", err)
	}
	if len(names) == maxNames {
		return nil, fmt.Errorf("list policy folder: it has more than %d entries", maxNames)
	}
	var out []stamp
	for _, name := range names {
		if !wanted(name) {
			continue
		}
		s := stamp{name: name}
		if info, err := root.Stat(name); err != nil {
			s.unreachable = true
		} else {
			s.size, s.mtime, s.mode = info.Size(), info.ModTime().UnixNano(), info.Mode()
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				s.inode, s.ctime = st.Ino, st.Ctim.Nano()
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b stamp) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// IsPolicyFile says whether ReadDir reads a file of that name.
func IsPolicyFile(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch fileKind(name) {
	case textFile, tuplesFile:
		return true
	case testFile:
		return false
	}
	ext := filepath.Ext(name)
	return ext == ".yaml" || ext == ".yml"
}

// IsTestFile says whether ReadTests reads a file of that name.
func IsTestFile(name string) bool {
	return !strings.HasPrefix(filepath.Base(name), ".") && fileKind(name) == testFile
}

func readFile(root *os.Root, name string) ([]byte, error) {
	// O_NONBLOCK: opening a FIFO must not wait for a writer.
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		if pe, ok := errors.AsType[*fs.PathError](err); ok {
			err = pe.Err
		}
		return nil, fmt.Errorf("cannot be opened: %w; links may only lead to files in the folder itself", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is not a regular file")
	}
	if info.Size() > MaxFileBytes {
		return nil, fmt.Errorf("the file is larger than %d MiB", MaxFileBytes>>20)
	}
	content, err := io.ReadAll(io.LimitReader(f, MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	if len(content) > MaxFileBytes {
		return nil, fmt.Errorf("the file is larger than %d MiB", MaxFileBytes>>20)
	}
	return content, nil
}
