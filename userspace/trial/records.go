// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

// maxRecord bounds a line of a decision log, in bytes. The agent's own are
// far shorter.
const maxRecord = 64 << 10

// ReadRecords reads a decision log, one JSON object a line, as the agent
// writes it or as `observe -o json` does, and hands over its decisions on
// calls: the refusals of the kernel and samples are not among them. It fails
// at the first line that is no record, with its number.
func ReadRecords(r io.Reader, f func(*pipeline.Record) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 4096), maxRecord)
	n := 0
	for s.Scan() {
		n++
		line := bytes.TrimSpace(s.Bytes())
		if len(line) == 0 {
			continue
		}
		rec, ok, err := readRecord(line)
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		if !ok {
			continue
		}
		if err := f(rec); err != nil {
			return err
		}
	}
	if errors.Is(s.Err(), bufio.ErrTooLong) {
		return fmt.Errorf("line %d: longer than %d KiB", n+1, maxRecord>>10)
	}
	return s.Err()
}

func readRecord(line []byte) (*pipeline.Record, bool, error) {
	var wrapped struct {
		Kind   string          `json:"kind"`
		Record json.RawMessage `json:"record"`
	}
	if err := json.Unmarshal(line, &wrapped); err != nil {
		return nil, false, fmt.Errorf("no record: %w", err)
	}
	switch wrapped.Kind {
	case "":
	case "decision":
		line = wrapped.Record
	default:
		return nil, false, nil
	}
	var rec pipeline.Record
	if err := json.Unmarshal(line, &rec); err != nil {
		return nil, false, fmt.Errorf("no record: %w", err)
	}
	switch {
	case rec.Decision == "":
		return nil, false, errNoDecision
	case rec.Stage == flow.StageKernel.String():
		return nil, false, nil
	}
	return &rec, true, nil
}

var errNoDecision = errors.New("no record: it has no decision")
