// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// The committed object and bindings are what the sources give, in whatever
// folder they are built.
func TestObjectIsWhatTheSourcesGive(t *testing.T) {
	if _, err := exec.LookPath("clang"); err != nil {
		if os.Getenv("SALLYPORT_TEST_STRICT") == "1" {
			t.Fatal("needs clang, which `make deps` installs: ", err)
		}
		t.Skip("needs clang: ", err)
	}
	version, err := exec.Command("clang", "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`clang version 14\.`).Match(version) {
		t.Skipf("the object is built with clang 14, this is %q", strings.SplitN(string(version), "\n", 2)[0])
	}
	dir := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.CopyFS(dir, os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kernel_bpfel.go", "kernel_bpfel.o"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	tool := filepath.Join(t.TempDir(), "bpf2go")
	if out, err := exec.Command("go", "build", "-o", tool, "github.com/cilium/ebpf/cmd/bpf2go").CombinedOutput(); err != nil {
		t.Fatalf("build bpf2go: %v\n%s", err, out)
	}
	gen, err := os.ReadFile("gen.go")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^//go:generate go run \S+/bpf2go (.*)$`).FindSubmatch(gen)
	if line == nil {
		t.Fatal("gen.go has no bpf2go line")
	}
	args := strings.Fields(strings.ReplaceAll(string(line[1]), "${PWD}", dir))
	cmd := exec.Command(tool, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOPACKAGE=bpf", "GOFILE=gen.go")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("bpf2go: %v\n%s", err, out)
	}
	for _, name := range []string{"kernel_bpfel.go", "kernel_bpfel.o"} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the sources give: run go generate ./bpf", name)
		}
	}
}

// Keys are compared and records decoded byte by byte, so no record may have
// a hole that the compiler fills with whatever is there.
func TestRecordsHaveNoHoles(t *testing.T) {
	spec, err := LoadKernel()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for name := range strings.FieldsSeq(`address identity_value path_key claimed_key claimed_value egress_key egress_value
		verdict_key verdict_value flow_key flow_value protected_key protected_value netns_value listening_key usage_value
		number_value name_key control_value socket_tag event sample forget_args`) {
		var s *btf.Struct
		if err := spec.Types.TypeByName(name, &s); err != nil {
			t.Errorf("find struct %s: %v", name, err)
			continue
		}
		seen++
		end := uint32(0)
		for _, m := range s.Members {
			if m.Offset.Bytes() != end {
				t.Errorf("%s has a hole before %s", name, m.Name)
			}
			size, err := btf.Sizeof(m.Type)
			if err != nil {
				t.Fatal(err)
			}
			end = m.Offset.Bytes() + uint32(size)
		}
		if end != s.Size {
			t.Errorf("%s has a hole of %d bytes at its end", name, s.Size-end)
		}
	}
	if seen == 0 {
		t.Error("no record was looked at")
	}
}

// What is pinned is documented and shared; nothing else is a map.
func TestMapsAreDocumented(t *testing.T) {
	spec, err := LoadKernel()
	if err != nil {
		t.Fatal(err)
	}
	header, err := os.ReadFile("include/maps.h")
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Maps {
		if name == ".rodata" {
			continue
		}
		at := bytes.Index(header, []byte("} "+name+" SEC(\".maps\");"))
		if at < 0 {
			t.Errorf("map %s is not in maps.h", name)
			continue
		}
		start := bytes.LastIndex(header[:at], []byte("*/"))
		comment := string(header[bytes.LastIndex(header[:start], []byte("/*")):start])
		if !regexp.MustCompile(`(?i)written`).MatchString(comment) {
			t.Errorf("map %s: its comment does not say who writes it", name)
		}
	}
}
