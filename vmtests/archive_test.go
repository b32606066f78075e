// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"bytes"
	"errors"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// entry of a newc archive that holds one file, field by field.
const oneFile = "070701" +
	"00000001" + "000081A4" + "00000000" + "00000000" + "00000001" + "00000000" + // ino, mode, uid, gid, nlink, mtime
	"00000003" + "00000000" + "00000000" + "00000000" + "00000000" + // size, device, device of a node
	"00000002" + "00000000" + "a\x00" + // length of the name with its end, checksum
	"abc\x00" +
	"070701" +
	"00000002" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" +
	"00000000" + "00000000" + "00000000" + "00000000" + "00000000" +
	"0000000B" + "00000000" + "TRAILER!!!\x00" + "\x00\x00\x00"

func TestArchiveIsNewc(t *testing.T) {
	var b bytes.Buffer
	a := newArchive(&b)
	a.Add("/a", 0o644, []byte("abc"))
	if err := a.Close(); err != nil || b.String() != oneFile {
		t.Errorf("got  %q\nwant %q (%v)", b.String(), oneFile, err)
	}
}

func TestArchiveMakesDirectoriesOnce(t *testing.T) {
	var b bytes.Buffer
	a := newArchive(&b)
	for _, name := range []string{"/x/y/1", "/x/y/2", "x/3", "/x//z/../4"} {
		a.Add(name, 0o755, []byte(name))
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if b.Len()%4 != 0 {
		t.Errorf("%d bytes", b.Len())
	}
	if got, want := list(t, b.Bytes()), "x/ x/y/ x/y/1 x/y/2 x/3 x/4 TRAILER!!!"; strings.Join(got, " ") != want {
		t.Errorf("it holds %v", got)
	}
}

// list returns the names of an archive, those of directories with a slash.
func list(t *testing.T, b []byte) (names []string) {
	t.Helper()
	number := func(at int) int {
		n, err := strconv.ParseUint(string(b[at:at+8]), 16, 32)
		must(t, err)
		return int(n)
	}
	for at := 0; at < len(b); {
		mode, size, length := number(at+14), number(at+54), number(at+94)
		name := string(b[at+110 : at+110+length-1])
		if mode&0o170000 == 0o040000 {
			name += "/"
		}
		names = append(names, name)
		at = (at+110+length+3)&^3 + (size+3)&^3
	}
	return names
}

type full struct{ left int }

var errFull = errors.New("full")

func (f *full) Write(b []byte) (int, error) {
	if f.left -= len(b); f.left < 0 {
		return 0, errFull
	}
	return len(b), nil
}

func TestArchiveReturnsTheFirstError(t *testing.T) {
	a := newArchive(&full{200})
	a.Add("/a", 0o644, make([]byte, 300))
	a.Add("/b", 0o644, nil)
	if err := a.Close(); !errors.Is(err, errFull) {
		t.Errorf("%v", err)
	}
}

func TestModuleName(t *testing.T) {
	for path, want := range map[string]string{
		"kernel/net/sctp/sctp.ko": "sctp", "kernel/crypto/sha256-generic.ko.xz": "sha256_generic", "virtio_pci": "virtio_pci",
	} {
		if got := moduleName(filepath.FromSlash(path)); got != want {
			t.Errorf("%s: %s", path, got)
		}
	}
}
