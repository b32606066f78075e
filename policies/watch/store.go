// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/sallyport-dev/sallyport/policies/load"
)

const (
	storeName   = "policies.last-good"
	damagedName = "policies.last-good.damaged"
	storeMagic  = "sallyport policies 1 "
	// JSON writes contents in base64; names are short.
	maxStore = 2*load.MaxSetBytes + load.MaxFiles*512
)

// store keeps one set of files: a line with the SHA-256 of the rest, and the
// files as JSON. Written whole and renamed, so that a crash leaves the one
// before.
type store struct {
	dir   string
	saved string // digest of what it holds
}

type storedFile struct {
	Path    string `json:"path"`
	Content []byte `json:"content"`
}

func (s *store) save(files []load.File) error {
	digest := load.Digest(files)
	if s.dir == "" || digest == s.saved {
		return nil
	}
	out := make([]storedFile, len(files))
	for i, f := range files {
		out[i] = storedFile(f)
	}
	body, err := json.Marshal(out)
	if err != nil {
		return fmt.Errorf("encode policy set: %w", err)
	}
	sum := sha256.Sum256(body)
	content := slices.Concat([]byte(storeMagic+hex.EncodeToString(sum[:])+"\n"), body)
	if err := writeAtomically(s.dir, storeName, content); err != nil {
		return fmt.Errorf("keep policy set in %s: %w", s.dir, err)
	}
	s.saved = digest
	return nil
}

func writeAtomically(dir, name string, content []byte) (err error) {
	tmp := filepath.Join(dir, name+".tmp")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // closed already, or without use
			_ = os.Remove(tmp)
		}
	}()
	if _, err = f.Write(content); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// load returns what was kept, nil if nothing was. What is damaged is set
// aside and said so.
func (s *store) load() ([]load.File, error) {
	if s.dir == "" {
		return nil, nil
	}
	path := filepath.Join(s.dir, storeName)
	files, err := readStore(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, errDamaged):
		aside := filepath.Join(s.dir, damagedName)
		if rerr := os.Rename(path, aside); rerr != nil {
			return nil, fmt.Errorf("restore the last good policy set: %w; setting it aside: %w", err, rerr)
		}
		return nil, fmt.Errorf("restore the last good policy set: %w; set aside as %s", err, aside)
	case err != nil:
		return nil, fmt.Errorf("restore the last good policy set: %w", err)
	}
	s.saved = load.Digest(files)
	return files, nil
}

var errDamaged = errors.New("it is damaged")

func readStore(path string) ([]load.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxStore+1))
	if err != nil {
		return nil, err
	}
	return decodeStore(content)
}

func decodeStore(content []byte) ([]load.File, error) {
	if len(content) > maxStore {
		return nil, fmt.Errorf("%w: larger than it can be", errDamaged)
	}
	head, body, ok := bytes.Cut(content, []byte("\n"))
	sum := sha256.Sum256(body)
	if !ok || string(head) != storeMagic+hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("%w: its checksum does not match", errDamaged)
	}
	var stored []storedFile
	if err := json.Unmarshal(body, &stored); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	files := make([]load.File, len(stored))
	for i, f := range stored {
		files[i] = load.File(f)
	}
	return files, nil
}
