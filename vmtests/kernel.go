// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// kernelImage is an unpacked kernel package.
type kernelImage struct {
	vmlinuz string
	modules string // lib/modules/RELEASE
}

// candidate is a package and one version of it.
type candidate struct{ name, version string }

// fetchKernel returns the newest kernel of a version such as "6.12" that apt
// has, downloaded into cache and unpacked there.
func fetchKernel(ctx context.Context, version, cache string) (*kernelImage, error) {
	c, err := newestKernel(ctx, version)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, c.name+"_"+c.version)
	if _, err := os.Stat(dir); err != nil {
		if err := download(ctx, c, dir); err != nil {
			return nil, err
		}
	}
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("look into %s: kernels %v: remove it and start again", dir, images)
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	// lib is a link to usr/lib in newer packages, which dpkg-deb leaves out.
	for _, lib := range []string{"lib", "usr/lib"} {
		path := filepath.Join(dir, lib, "modules", release)
		if _, err := os.Stat(path); err == nil {
			return &kernelImage{images[0], path}, nil
		}
	}
	return nil, fmt.Errorf("look into %s: it has no modules of %s", dir, release)
}

func newestKernel(ctx context.Context, version string) (candidate, error) {
	// 6.1 is linux-image-6.1.0-56-..., 6.12 linux-image-6.12.117+deb12-...
	pattern := `^linux-image-` + regexp.QuoteMeta(version) + `[.-].*-?cloud-amd64-unsigned$`
	out, err := output(ctx, "apt-cache", "search", "--names-only", pattern)
	if err != nil {
		return candidate{}, err
	}
	var names []string
	for line := range strings.Lines(out) {
		if name, _, ok := strings.Cut(line, " "); ok {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return candidate{}, fmt.Errorf("find kernel %s: apt has no package that matches %s: "+
			"run apt-get update, or add the Debian release or its backports that has it", version, pattern)
	}
	if out, err = output(ctx, "apt-cache", append([]string{"madison"}, names...)...); err != nil {
		return candidate{}, err
	}
	candidates := parseMadison(out)
	if len(candidates) == 0 {
		return candidate{}, fmt.Errorf("find kernel %s: apt has no source for %s", version, strings.Join(names, ", "))
	}
	var failed error
	newest := slices.MaxFunc(candidates, func(a, b candidate) int {
		if a.version == b.version {
			return 0
		}
		err := exec.CommandContext(ctx, "dpkg", "--compare-versions", a.version, "gt", b.version).Run()
		if err == nil {
			return 1
		}
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
			failed = fmt.Errorf("compare versions: %w", err)
		}
		return -1
	})
	return newest, failed
}

// parseMadison reads "name | version | source" lines, without those of what
// is only installed.
func parseMadison(out string) []candidate {
	var list []candidate
	for line := range strings.Lines(out) {
		fields := strings.Split(line, "|")
		if len(fields) == 3 && strings.HasSuffix(strings.TrimSpace(fields[2]), "Packages") {
			list = append(list, candidate{strings.TrimSpace(fields[0]), strings.TrimSpace(fields[1])})
		}
	}
	return list
}

// download leaves dir complete or not there at all.
func download(ctx context.Context, c candidate, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	cmd := exec.CommandContext(ctx, "apt-get", "download", "-q", c.name+"="+c.version)
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("download %s: %w\n%s", c.name, err, out)
	}
	files, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(files) != 1 {
		return fmt.Errorf("download %s: it left %v", c.name, files)
	}
	root := filepath.Join(tmp, "root")
	if _, err := output(ctx, "dpkg-deb", "-x", files[0], root); err != nil {
		return err
	}
	if err := os.Rename(root, dir); err != nil && !os.IsExist(err) {
		if _, found := os.Stat(dir); found != nil {
			return err
		}
	}
	return nil
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, exit.Stderr)
		}
		return "", fmt.Errorf("%s: %w: it is part of Debian and Ubuntu", name, err)
	}
	return string(out), nil
}
