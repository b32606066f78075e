// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"flag"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/relations"
)

var update = flag.Bool("update", false, "write what is said into testdata")

const errorTable = "../testdata/errors.txtar"

var testNow = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func testOptions() Options {
	return Options{TrustDomain: "example.org", Node: "node-1", Now: func() time.Time { return testNow }}
}

// TestErrors holds what is said of each wrong set against the table: every
// error, with its file, line and column.
func TestErrors(t *testing.T) {
	archive, err := txtar.ParseFile(errorTable)
	if err != nil {
		t.Fatal(err)
	}
	var base load.File
	var files []load.File
	cases := 0
	for i := range archive.Files {
		f := &archive.Files[i]
		name := path.Dir(f.Name)
		switch path.Base(f.Name) {
		case "base.yaml":
			base = load.File{Path: f.Name, Content: f.Data}
			continue
		case "want":
		default:
			files = append(files, load.File{Path: path.Base(f.Name), Content: f.Data})
			continue
		}
		set := append([]load.File{base}, files...)
		files = nil
		cases++
		t.Run(name, func(t *testing.T) {
			if !relations.Built && slices.Contains([]string{"model-wrong", "tuples-untrue", "rule-relation-unknown"}, name) {
				t.Skip("built without the relation engine: models are not read")
			}
			opt := testOptions()
			if name == "identity-id-unproven" {
				opt.Domains = []string{"other.org"}
			}
			if strings.HasPrefix(name, "tenant-") {
				opt.Tenant = &Tenancy{Namespace: "shop", Hosts: []string{"sso.shop.example", "10.0.0.1", "localhost"},
					Context: func(file string) bool { return file == base.Path }}
			}
			plan, problems := Build(set, opt)
			var b strings.Builder
			for _, p := range problems {
				if p.File == "f.yaml" && (p.Line == 0 || p.Column == 0) {
					t.Errorf("without place: %s", p)
				}
				b.WriteString(p.String() + "\n")
			}
			if (plan == nil) != load.HasErrors(problems) {
				t.Errorf("plan %v with %d problems", plan != nil, len(problems))
			}
			if *update {
				f.Data = []byte(b.String())
				return
			}
			if got := b.String(); got != string(f.Data) {
				t.Errorf("said:\n%swant:\n%s", got, f.Data)
			}
		})
	}
	if cases < 100 {
		t.Errorf("%d cases: the table was not read", cases)
	}
	if *update {
		if err := os.WriteFile(errorTable, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
