// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestArguments(t *testing.T) {
	for accelerator, cpu := range map[string]string{"tcg,thread=multi": "max", "kvm": "host"} {
		m := machine{accelerator: accelerator, dir: "/d"}
		args := m.arguments()
		i := slices.Index(args, "-cpu")
		if i < 0 || args[i+1] != cpu {
			t.Errorf("%s: %v", accelerator, args)
		}
	}
}

func TestImpatient(t *testing.T) {
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	var b [8]byte
	i := &impatient{t.Context(), r, time.Millisecond}
	if _, err := i.Read(b[:]); err == nil || !strings.Contains(err.Error(), "nothing came") {
		t.Errorf("silence: %v", err)
	}
	i.limit = time.Minute
	if _, err := w.WriteString("abc"); err != nil {
		t.Fatal(err)
	}
	if n, err := i.Read(b[:]); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	i.ctx = ctx
	if _, err := i.Read(b[:]); err == nil {
		t.Error("it waited beyond the end of its context")
	}
	must(t, w.Close())
	i.ctx = t.Context()
	if _, err := i.Read(b[:]); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

func TestParseMadison(t *testing.T) {
	got := parseMadison(`linux-image-6.1.0-56-cloud-amd64-unsigned | 6.1.192-2 | http://deb.debian.org/debian-security bookworm-security/main amd64 Packages
 linux-image-6.1.0-47-cloud-amd64-unsigned |  6.1.170-3 | http://deb.debian.org/debian bookworm/main amd64 Packages
     linux |  6.1.170-3 | http://deb.debian.org/debian bookworm/main Sources
nonsense
`)
	want := []candidate{{"linux-image-6.1.0-56-cloud-amd64-unsigned", "6.1.192-2"}, {"linux-image-6.1.0-47-cloud-amd64-unsigned", "6.1.170-3"}}
	if !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}
