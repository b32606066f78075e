// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// object is an ELF file with nothing but a .modinfo.
func object(t *testing.T, info string) []byte {
	t.Helper()
	const names = "\x00.modinfo\x00.shstrtab\x00"
	header := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2,
	}
	header.Shoff = 64 + uint64(len(info)+len(names))
	var b bytes.Buffer
	for _, v := range []any{
		header, []byte(info), []byte(names), elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(info))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: 64 + uint64(len(info)), Size: uint64(len(names))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// tree is a folder of modules; the content of each is its depends=.
func tree(t *testing.T, builtin string, files map[string]string) *modules {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, b, 0o644))
	}
	write("modules.builtin", []byte(builtin))
	write("modules.order", nil)
	for name, depends := range files {
		b := object(t, "license=GPL\x00depends="+depends+"\x00name=x\x00")
		if strings.HasSuffix(name, ".xz") {
			cmd := exec.Command("xz", "-c")
			cmd.Stdin = bytes.NewReader(b)
			out, err := cmd.Output()
			if err != nil {
				t.Skip("needs xz: ", err)
			}
			b = out
		}
		write(name, b)
	}
	m, err := openModules(dir)
	must(t, err)
	return m
}

func TestResolve(t *testing.T) {
	m := tree(t, "kernel/lib/built-in.ko\n", map[string]string{
		"kernel/net/top.ko":           "left,right-one,built_in",
		"kernel/net/left.ko":          "bottom",
		"kernel/net/right-one.ko.xz":  "bottom",
		"kernel/drivers/bottom.ko.xz": "",
		"kernel/other.ko":             "missing",
		"kernel/a.ko":                 "b",
		"kernel/b.ko":                 "a",
	})
	for _, c := range []struct{ names, want string }{
		{"bottom", "bottom"},
		{"top", "bottom left right_one top"},
		{"built-in", ""},
		{"right-one top bottom", "bottom right_one left top"},
		{"missing", "!this kernel has none"},
		{"top other", "!missing: this kernel has none"},
		{"a", "!it depends on itself"},
	} {
		list, err := m.Resolve(strings.Fields(c.names)...)
		if want, bad := strings.CutPrefix(c.want, "!"); bad {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", c.names, err)
			}
			continue
		}
		var got []string
		for _, m := range list {
			got = append(got, m.name)
			if !bytes.HasPrefix(m.content, []byte(elf.ELFMAG)) {
				t.Errorf("%s is packed still", m.name)
			}
		}
		if strings.Join(got, " ") != c.want || err != nil {
			t.Errorf("%s: %v, %v", c.names, got, err)
		}
	}
}

func TestModulesThatAreNone(t *testing.T) {
	if _, err := openModules(t.TempDir()); err == nil {
		t.Error("a folder without modules.builtin was taken")
	}
	m := tree(t, "", nil)
	m.files["text"] = filepath.Join(t.TempDir(), "text.ko")
	must(t, os.WriteFile(m.files["text"], []byte("not an object"), 0o644))
	if _, err := m.Resolve("text"); err == nil {
		t.Error("a text was taken for a module")
	}
}
