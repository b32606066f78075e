// SPDX-License-Identifier: Apache-2.0

package events

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func eventRecord() []byte {
	b := make([]byte, EventSize)
	le := binary.LittleEndian
	le.PutUint64(b, uint64(time.Second))
	le.PutUint64(b[8:], 11)
	le.PutUint64(b[16:], 12)
	le.PutUint64(b[24:], 13)
	copy(b[32:], netip.MustParseAddr("::ffff:192.0.2.1").AsSlice())
	copy(b[48:], netip.MustParseAddr("2001:db8::1").AsSlice())
	le.PutUint32(b[64:], 7)
	le.PutUint32(b[68:], 8)
	le.PutUint16(b[72:], 1234)
	le.PutUint16(b[74:], 80)
	b[76], b[77], b[78], b[79] = 6, byte(HookEgress), 2, 6
	return b
}

func TestDecodeEvent(t *testing.T) {
	got, err := DecodeEvent(eventRecord())
	if err != nil {
		t.Fatal(err)
	}
	want := Event{
		Time: time.Second, NetnsCookie: 11, CgroupID: 12, Cookie: 13, Identity: 7, Target: 8,
		Source: netip.MustParseAddrPort("192.0.2.1:1234"), Destination: netip.MustParseAddrPort("[2001:db8::1]:80"),
		Reason: flow.ReasonUntagged, Hook: HookEgress, Enforced: true, Protocol: 6,
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for name, change := range map[string]func([]byte) []byte{
		"short":          func(b []byte) []byte { return b[:EventSize-1] },
		"empty":          func([]byte) []byte { return nil },
		"no reason":      func(b []byte) []byte { b[76] = 0; return b },
		"unknown reason": func(b []byte) []byte { b[76] = byte(ReasonCount); return b },
	} {
		if e, err := DecodeEvent(change(eventRecord())); err == nil {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func sampleRecord(method, path, host string) []byte {
	b := make([]byte, SampleSize)
	le := binary.LittleEndian
	copy(b[16:], netip.MustParseAddr("2001:db8::2").AsSlice())
	copy(b[32:], netip.MustParseAddr("::ffff:192.0.2.9").AsSlice())
	le.PutUint32(b[48:], 7)
	le.PutUint32(b[52:], 500)
	le.PutUint32(b[56:], 2)
	le.PutUint16(b[60:], 1234)
	le.PutUint16(b[62:], 80)
	b[64], b[65], b[66], b[67], b[68] = byte(len(method)), byte(len(path)), byte(len(host)), sampleIngress|sampleHostCut, 1
	copy(b[methodAt:], method)
	copy(b[pathAt:], path)
	copy(b[hostAt:], host)
	return b
}

func TestDecodeSample(t *testing.T) {
	path, host := strings.Repeat("p", pathSize), strings.Repeat("h", hostSize)
	got, err := DecodeSample(sampleRecord("OPTIONSX", path, host))
	if err != nil {
		t.Fatal(err)
	}
	want := Sample{
		Identity: 7, Payload: 500, Interface: 2, Kind: 1, Ingress: true, HostCut: true, Method: "OPTIONSX", Path: path, Host: host,
		Source: netip.MustParseAddrPort("[2001:db8::2]:1234"), Destination: netip.MustParseAddrPort("192.0.2.9:80"),
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for at, size := range map[int]int{64: methodSize, 65: pathSize, 66: hostSize} {
		b := sampleRecord("GET", "/", "h")
		b[at] = byte(size + 1)
		if s, err := DecodeSample(b); err == nil {
			t.Errorf("length %d at %d: %+v", size+1, at, s)
		}
	}
	if _, err := DecodeSample(make([]byte, SampleSize-1)); err == nil {
		t.Error("a short record was decoded")
	}
}

func FuzzDecodeEvent(f *testing.F) {
	f.Add(eventRecord())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := DecodeEvent(b)
		if err == nil && (e.Reason == flow.ReasonOK || e.Hook.String() == "") {
			t.Errorf("%+v", e)
		}
	})
}

func FuzzDecodeSample(f *testing.F) {
	f.Add(sampleRecord("GET", "/a", "example.test"))
	f.Add(make([]byte, SampleSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeSample(b)
		if err == nil && (len(s.Method) > methodSize || len(s.Path) > pathSize || len(s.Host) > hostSize) {
			t.Errorf("%+v", s)
		}
	})
}
