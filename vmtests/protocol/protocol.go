// SPDX-License-Identifier: Apache-2.0

// Package protocol is what the host and the guest of vmtests say to each
// other: a Plan in the initramfs, and Records, one JSON object a line, back
// through a virtio serial port.
package protocol

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Where things are in the guest, and the name of the port that results leave
// by.
const (
	PlanPath = "/plan.json"
	PortName = "vmtest.results"
)

// MaxLine is how long a record may be, in bytes.
const MaxLine = 1 << 20

// Plan says what the guest does.
type Plan struct {
	Modules []string // paths, in the order in which they are loaded
	Tests   []Test
}

// Test is one test binary.
type Test struct {
	Package string
	Binary  string
	Dir     string // that it runs in
	Args    []string
}

// Kinds of records, in the order in which they come: Boot; for each test
// Start, Line..., End; Done.
const (
	Boot  = "boot"  // Text is the kernel's release
	Start = "start" // a test binary is run
	Line  = "line"  // Text is one line that it wrote
	End   = "end"   // it ended; Text is its exit status, "" for 0
	Error = "error" // the guest could not go on; Text says why
	Done  = "done"  // all was run: only now is anything worth something
)

// Record is one thing that the guest reports.
type Record struct {
	Kind    string
	Package string `json:",omitempty"`
	Text    string `json:",omitempty"`
}

// ErrNotDone means that the records end before the guest said that it is
// done.
var ErrNotDone = errors.New("the guest ended before it was done")

// Write writes one record.
func Write(w io.Writer, r Record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// Read calls f with each record until Done. Anything else at the end, or
// anything that is no record, is an error.
func Read(r io.Reader, f func(Record)) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, MaxLine)
	for s.Scan() {
		var rec Record
		d := json.NewDecoder(bytes.NewReader(s.Bytes()))
		d.DisallowUnknownFields()
		if err := d.Decode(&rec); err != nil {
			return fmt.Errorf("read record %.80q: %w", s.Bytes(), err)
		}
		switch rec.Kind {
		case Error:
			return fmt.Errorf("the guest gave up: %s", rec.Text)
		case Done:
			return nil
		case Boot, Start, Line, End:
			f(rec)
		default:
			return fmt.Errorf("read record: kind %.80q", rec.Kind)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	return ErrNotDone
}
