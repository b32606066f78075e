// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"math/big"
	"strings"
	"testing"
	"time"
)

func TestRevocations(t *testing.T) {
	hour := testNow.Add(time.Hour)
	r, err := NewRevocations([]Revocation{
		{Kind: RevokeIdentity, Value: testID, Until: hour},
		{Kind: RevokeSerial, Value: "00:AB:cd"},
		{Kind: RevokeJTI, Value: "x"},
		{Kind: RevokeSubject, Value: "iss|sub", Since: testNow, Until: hour},
		{Kind: RevokeSubject, Value: "iss|sub", Since: testNow.Add(-time.Hour), Until: hour.Add(time.Hour)},
		{Kind: RevokeIssuer, Value: "iss", Until: hour},
		{Kind: RevokeIssuer, Value: "iss"},
		{Kind: RevokeIssuer, Value: "iss", Until: hour},
	}, 7)
	if err != nil {
		t.Fatal(err)
	}
	if r.Generation() != 7 || r.Len() != 5 {
		t.Errorf("generation %d, %d entries; want 7, 5", r.Generation(), r.Len())
	}
	for _, c := range []struct {
		kind  RevocationKind
		value string
		at    time.Time
		want  bool
	}{
		{RevokeIdentity, testID, testNow, true},
		{RevokeIdentity, testID, hour, false},
		{RevokeIdentity, "spiffe://td/b", testNow, false},
		{RevokeSerial, Serial(big.NewInt(0xabcd)), testNow, true},
		{RevokeSerial, "x", testNow, false},
		{RevokeJTI, "x", testNow.Add(1e6 * time.Hour), true},
		{RevokeJTI, testID, testNow, false},
		{RevokeSubject, "iss|sub", hour.Add(time.Minute), true},
		{RevokeIssuer, "iss", hour.Add(time.Hour), true},
	} {
		if _, ok := r.Find(c.kind, c.value, c.at); ok != c.want {
			t.Errorf("%s %q at %v: %v", c.kind, c.value, c.at, ok)
		}
	}
	if e, _ := r.Find(RevokeSubject, "iss|sub", testNow); !e.Since.Equal(testNow) {
		t.Errorf("since %v, want the later one", e.Since)
	}
	var none *Revocations
	if _, ok := none.Find(RevokeJTI, "x", testNow); ok || none.Generation() != 0 || none.Len() != 0 {
		t.Error("the nil list revokes")
	}
	if n := testing.AllocsPerRun(100, func() { r.Find(RevokeIdentity, testID, testNow) }); n != 0 {
		t.Errorf("%v allocations a look-up", n)
	}
	for name, e := range map[string]Revocation{
		"kind": {Kind: "node", Value: "x"}, "empty": {Kind: RevokeJTI}, "long": {Kind: RevokeJTI, Value: strings.Repeat("x", maxRevocationValue+1)},
	} {
		if _, err := NewRevocations([]Revocation{e}, 1); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := NewRevocations(make([]Revocation, MaxRevocations+1), 1); err == nil {
		t.Error("too many: accepted")
	}
}
