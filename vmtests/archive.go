// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"
)

// archive writes a cpio archive of the kind "newc", that the kernel unpacks
// as its first root file system (Documentation/driver-api/early-userspace/
// buffer-format.rst). Directories are made as they are needed. The first
// error stays and is returned by Close.
type archive struct {
	w    io.Writer
	n    int64
	ino  uint32
	dirs map[string]bool
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: w, dirs: map[string]bool{".": true}}
}

// Add writes a file; name is absolute in the guest.
func (a *archive) Add(name string, mode fs.FileMode, content []byte) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	a.mkdir(path.Dir(name))
	a.entry(name, 0o100000|uint32(mode.Perm()), content)
}

func (a *archive) mkdir(name string) {
	if a.dirs[name] {
		return
	}
	a.mkdir(path.Dir(name))
	a.dirs[name] = true
	a.entry(name, 0o040755, nil)
}

// Close writes the trailer.
func (a *archive) Close() error {
	a.entry("TRAILER!!!", 0, nil)
	return a.err
}

func (a *archive) entry(name string, mode uint32, content []byte) {
	if int64(len(content)) > math.MaxUint32 {
		a.fail(fmt.Errorf("archive %s: %d bytes are too many", name, len(content)))
		return
	}
	a.ino++
	a.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.ino, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name))
	a.pad()
	a.write(content)
	a.pad()
}

// pad fills up to a multiple of four.
func (a *archive) pad() { a.write(make([]byte, -a.n&3)) }

func (a *archive) write(b []byte) {
	if a.err != nil {
		return
	}
	n, err := a.w.Write(b)
	a.n += int64(n)
	a.fail(err)
}

func (a *archive) fail(err error) {
	if a.err == nil {
		a.err = err
	}
}
