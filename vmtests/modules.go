// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// module is one kernel module, as it is loaded.
type module struct {
	name    string
	content []byte
}

// modules is what a kernel package has of them.
type modules struct {
	builtin map[string]bool
	files   map[string]string // path by name
}

// moduleName is how modules.builtin, file names and depends= come to agree.
func moduleName(path string) string {
	name := filepath.Base(path)
	for _, suffix := range []string{".xz", ".ko"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return strings.ReplaceAll(name, "-", "_")
}

// openModules lists the modules beneath dir, which is lib/modules/RELEASE.
func openModules(dir string) (*modules, error) {
	m := &modules{builtin: map[string]bool{}, files: map[string]string{}}
	f, err := os.Open(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		m.builtin[moduleName(s.Text())] = true
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if name := filepath.Base(path); err == nil && d.Type().IsRegular() && (strings.HasSuffix(name, ".ko") || strings.HasSuffix(name, ".ko.xz")) {
			m.files[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	return m, nil
}

// Resolve returns the named modules and what they depend on, each after its
// dependencies. What is built into the kernel is left out.
func (m *modules) Resolve(names ...string) ([]module, error) {
	var list []module
	state := map[string]int{} // 1: under way, 2: listed
	var add func(name string) error
	add = func(name string) error {
		if m.builtin[name] || state[name] == 2 {
			return nil
		}
		if state[name] == 1 {
			return fmt.Errorf("resolve module %s: it depends on itself", name)
		}
		state[name] = 1
		path, ok := m.files[name]
		if !ok {
			return fmt.Errorf("resolve module %s: this kernel has none", name)
		}
		content, err := readModule(path)
		if err != nil {
			return fmt.Errorf("resolve module %s: %w", name, err)
		}
		depends, err := dependencies(content)
		if err != nil {
			return fmt.Errorf("resolve module %s: %w", name, err)
		}
		for _, d := range depends {
			if err := add(moduleName(d)); err != nil {
				return err
			}
		}
		state[name] = 2
		list = append(list, module{name, content})
		return nil
	}
	for _, name := range names {
		if err := add(moduleName(name)); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func readModule(path string) ([]byte, error) {
	if !strings.HasSuffix(path, ".xz") {
		return os.ReadFile(path)
	}
	b, err := exec.Command("xz", "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("xz -dc %s: %w", path, err)
	}
	return b, nil
}

// dependencies reads depends= of the section .modinfo.
func dependencies(content []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	return depends(info), nil
}

func depends(info []byte) []string {
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(list, ",")
		}
	}
	return nil
}
