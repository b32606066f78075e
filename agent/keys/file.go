// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// fileMark is what changes with a file's content. It is of the file that a
// path leads to, so a swapped symbolic link (a ConfigMap) is a change too.
type fileMark struct {
	inode, device uint64
	size          int64
	modified      time.Time
}

func markOf(info os.FileInfo) fileMark {
	m := fileMark{size: info.Size(), modified: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		m.inode, m.device = st.Ino, st.Dev
	}
	return m
}

// readFile reads a key set's file: a regular one, at most MaxDocument long. A
// pipe or a device is refused without waiting for it.
func readFile(path string) ([]byte, fileMark, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fileMark{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fileMark{}, err
	}
	mark := markOf(info)
	if !info.Mode().IsRegular() {
		return nil, mark, errors.New("it is not a regular file")
	}
	document, err := bounded(f)
	return document, mark, err
}

// bounded reads a document that must not be longer than MaxDocument.
func bounded(r io.Reader) ([]byte, error) {
	document, err := io.ReadAll(io.LimitReader(r, MaxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(document) > MaxDocument {
		return nil, fmt.Errorf("it is over %d bytes", MaxDocument)
	}
	return document, nil
}

// changed says whether the file is another than the one last read.
func (s *source) changed() bool {
	info, err := os.Stat(s.File)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		return s.problem == nil
	}
	return markOf(info) != s.seen
}
