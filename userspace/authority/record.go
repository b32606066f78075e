// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

func writeRecord(path string, record any) error {
	b, err := json.MarshalIndent(record, "", "  ")
	if err != nil {
		return err
	}
	if len(b) > maxRecord {
		return fmt.Errorf("write %s: %d bytes, at most %d", path, len(b), maxRecord)
	}
	return statefile.Write(path, append(b, '\n'))
}

func readRecord[T any](path string) (record T, err error) {
	b, err := statefile.Read(path, maxRecord)
	if err != nil {
		return record, err
	}
	if err := decodeStrict(b, &record); err != nil {
		return record, fmt.Errorf("read %s: %w", path, err)
	}
	return record, nil
}

// decodeStrict takes one JSON value of known members and nothing after it.
func decodeStrict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// names lists the records of a directory, sorted.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []string
	for _, e := range entries {
		if !e.IsDir() && strings.HasSuffix(e.Name(), ".json") && !strings.HasPrefix(e.Name(), ".") {
			list = append(list, e.Name())
		}
	}
	return list, nil
}

func count(dir string) (int, error) {
	list, err := names(dir)
	return len(list), err
}

// eachRecord passes over what another process removed in between.
func eachRecord[T any](dir string, f func(T)) error {
	list, err := names(dir)
	if err != nil {
		return err
	}
	for _, name := range list {
		record, err := readRecord[T](filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		f(record)
	}
	return nil
}
