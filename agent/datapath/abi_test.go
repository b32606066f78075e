// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

func record(t *testing.T, name string) *btf.Struct {
	t.Helper()
	spec, err := bpf.LoadKernel()
	must(t, err)
	var s *btf.Struct
	must(t, spec.Types.TypeByName(name, &s))
	return s
}

// The plain Go copies hold the fields where the kernel's BTF says they are.
func TestAbiAgreesWithBTF(t *testing.T) {
	for name, typ := range map[string]reflect.Type{
		"flow_key": reflect.TypeFor[abi.FlowKey](), "flow_value": reflect.TypeFor[abi.FlowValue](), "address": reflect.TypeFor[abi.Address](),
	} {
		s := record(t, name)
		if uint32(typ.Size()) != s.Size {
			t.Errorf("%s has %d bytes in Go, %d in the kernel", name, typ.Size(), s.Size)
		}
		i := 0
		for f := range fields(typ) {
			if f.Name == "_" {
				continue
			}
			m := s.Members[i]
			i++
			size, err := btf.Sizeof(m.Type)
			must(t, err)
			if uint32(f.Offset) != m.Offset.Bytes() || int(f.Type.Size()) != size {
				t.Errorf("%s.%s is at %d with %d bytes in Go, at %d with %d in the kernel", name, m.Name, f.Offset, f.Type.Size(), m.Offset.Bytes(), size)
			}
		}
		if i != len(s.Members) {
			t.Errorf("%s has %d fields in Go, %d in the kernel", name, i, len(s.Members))
		}
	}
}

func fields(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for field := range t.Fields() {
			if !yield(field) {
				return
			}
		}
	}
}

func bytesOf[T any](v *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

// agent/events decodes by offset, because it does not import the kernel half.
func TestEventsAgreeWithBTF(t *testing.T) {
	if events.EventSize != record(t, "event").Size || events.SampleSize != record(t, "sample").Size {
		t.Fatal("the sizes of the records differ")
	}
	src, dst := netip.MustParseAddrPort("192.0.2.1:1234"), netip.MustParseAddrPort("[2001:db8::1]:80")
	e := bpf.KernelEvent{Time: 1, Netns: 2, Cgroup: 3, Cookie: 4, Identity: 5, Target: 6, Sport: src.Port(), Dport: dst.Port(),
		Reason: uint8(bpf.KernelCounterREASON_BOUND_DEVICE), Hook: uint8(bpf.KernelHookHOOK_CONNECT), Mode: 2, Proto: 17}
	e.Src.Word, e.Dst.Word = words(src.Addr()), words(dst.Addr())
	got, err := events.DecodeEvent(bytesOf(&e))
	want := events.Event{Time: 1, NetnsCookie: 2, CgroupID: 3, Cookie: 4, Source: src, Destination: dst, Identity: 5, Target: 6,
		Reason: flow.ReasonDevice, Hook: events.HookConnect, Enforced: true, Protocol: 17}
	if err != nil || got != want {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, want)
	}
	s := bpf.KernelSample{Time: 1, Netns: 2, Identity: 5, Payload: 6, Ifindex: 7, Sport: src.Port(), Dport: dst.Port(), MethodLen: 3,
		PathLen: 2, HostLen: 4, Kind: 2, Flags: uint8(bpf.KernelSampleFlagsSAMPLE_INGRESS | bpf.KernelSampleFlagsSAMPLE_PATH_CUT)}
	s.Src.Word, s.Dst.Word = words(src.Addr()), words(dst.Addr())
	copy(s.Method[:], "GET")
	copy(s.Path[:], "/p")
	copy(s.Host[:], "host")
	gotSample, err := events.DecodeSample(bytesOf(&s))
	wantSample := events.Sample{Time: 1, NetnsCookie: 2, Source: src, Destination: dst, Identity: 5, Payload: 6, Interface: 7, Kind: 2,
		Ingress: true, PathCut: true, Method: "GET", Path: "/p", Host: "host"}
	if err != nil || gotSample != wantSample {
		t.Errorf("got  %+v, %v\nwant %+v", gotSample, err, wantSample)
	}
}

// Every reason of the kernel has a reason of ours, and none has two.
func TestReasonsAgree(t *testing.T) {
	if events.ReasonCount != int(bpf.KernelCounterREASON_COUNT) {
		t.Fatalf("%d reasons, the kernel has %d", events.ReasonCount, bpf.KernelCounterREASON_COUNT)
	}
	for code, want := range map[bpf.KernelCounter]flow.Reason{
		bpf.KernelCounterREASON_VERDICT_DENY: flow.ReasonVerdictDeny, bpf.KernelCounterREASON_BIND_GUARD: flow.ReasonBindGuard,
		bpf.KernelCounterREASON_OWN_PORT: flow.ReasonUnguarded, bpf.KernelCounterREASON_LISTENER_GONE: flow.ReasonListenerGone,
		bpf.KernelCounterREASON_SERVER_GONE: flow.ReasonServerGone, bpf.KernelCounterREASON_UNTAGGED: flow.ReasonUntagged,
		bpf.KernelCounterREASON_MAP_FULL: flow.ReasonMapFull, bpf.KernelCounterREASON_FOREIGN_SOCKET: flow.ReasonForeignSocket,
		bpf.KernelCounterREASON_BOUND_DEVICE: flow.ReasonDevice, bpf.KernelCounterREASON_SOCKET_KIND: flow.ReasonSocketKind,
		bpf.KernelCounterREASON_EGRESS: flow.ReasonEgress, bpf.KernelCounterREASON_IDENTITY_REVOKED: flow.ReasonIdentityRevoked,
		bpf.KernelCounterREASON_NOT_READY: flow.ReasonNotReady, bpf.KernelCounterREASON_IDENTITY_EXPIRED: flow.ReasonIdentityExpired,
	} {
		if got, ok := events.ReasonOf(uint8(code)); !ok || got != want {
			t.Errorf("code %d is %q, want %q", code, got, want)
		}
	}
	if bpf.KernelActionACTION_DIRECT != bpf.KernelAction(flow.ActionDirect) || bpf.KernelActionACTION_DENY != bpf.KernelAction(flow.ActionDeny) {
		t.Error("the actions have other numbers in Go")
	}
	if abi.KindOut != bpf.KernelFlowKindFLOW_OUT || abi.KindDirect != bpf.KernelFlowKindFLOW_DIRECT || abi.KindDial != bpf.KernelFlowKindFLOW_DIAL ||
		abi.FlagPeer != bpf.KernelFlowFlagsFLOW_PEER {
		t.Error("the kinds of flows have other numbers in Go")
	}
}

// The descriptor that is handed out reads and cannot write.
func TestFlowMapReadOnly(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	f, err := n.FlowMapReadOnly()
	must(t, err)
	defer f.Close()
	if _, err := n.client.Dial(address4); err != nil {
		t.Fatal(err)
	}
	s, peer, err := outbound[4].Accept()
	must(t, err)
	local, err := s.Local()
	must(t, err)
	m := abi.NewFlowMap(int(f.Fd()))
	key := abi.Key(n.netns.Cookie, peer, local)
	var v abi.FlowValue
	if err := m.Lookup(&key, &v); err != nil || v.Original() != address4 {
		t.Errorf("%s, %v", v.Original(), err)
	}
	if allocs := testing.AllocsPerRun(100, func() { _ = m.Lookup(&key, &v) }); allocs > 0 {
		t.Errorf("a look-up allocates %v times", allocs)
	}
	missing := abi.Key(1, peer, local)
	if err := m.Lookup(&missing, &v); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a missing entry: %v", err)
	}
	fd, err := dup(int(f.Fd()), "copy")
	must(t, err)
	writable, err := ebpf.NewMapFromFD(int(fd.Fd()))
	if err == nil {
		if err := writable.Put(&key, &v); err == nil {
			t.Error("it could be written")
		}
		if err := writable.Delete(&key); err == nil {
			t.Error("an entry could be deleted")
		}
		writable.Close()
	}
}

func TestNumbersPersist(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	long := "spiffe://sallyport.local/" + string(make([]byte, 400))
	names := []string{"spiffe://a/b", "spiffe://a/c", long, long + "x", "\xff"}
	var numbers []flow.IdentityNumber
	seen := map[flow.IdentityNumber]bool{0: true}
	for _, name := range names {
		number, err := n.AllocateNumber(name)
		must(t, err)
		if seen[number] {
			t.Errorf("%.20q has number %d, which is taken", name, number)
		}
		seen[number] = true
		numbers = append(numbers, number)
	}
	again, err := New(n.kernel, Options{})
	must(t, err)
	for i, name := range names {
		if number, err := again.AllocateNumber(name); err != nil || number != numbers[i] {
			t.Errorf("%.20q had %d, has %d (%v)", name, numbers[i], number, err)
		}
	}
	if number, err := again.AllocateNumber("spiffe://new"); err != nil || seen[number] {
		t.Errorf("a new ID got %d (%v)", number, err)
	}
	if _, err := again.AllocateNumber(""); err == nil {
		t.Error("no ID got a number")
	}
}

// What a new agent does to the state of an old one.
func TestNewAgentVoidsVerdicts(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	g, err := n.GenerationOf("policy")
	must(t, err)
	n.direct(t, address4, time.Hour)
	d, err := New(n.kernel, Options{Ceiling: flow.ModeEnforce})
	must(t, err)
	// Not even one that was decided before and comes late.
	must(t, d.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: address4,
		Action: flow.ActionDirect, Expires: time.Hour}, g))
	if _, err := n.client.Dial(address4); err != nil {
		t.Fatal(err)
	}
	if _, _, err := outbound[4].Accept(); err != nil {
		t.Errorf("a verdict of the old agent was used: %v", err)
	}
	// Slots that are in use are not given out again.
	before, err := d.Listeners(n.netns.Cookie)
	must(t, err)
	must(t, d.AddNetns(1<<60))
	must(t, d.Protect(ProtectedPort{1 << 60, 1}, Protection{serverNumber, flow.ModeEnforce}))
	if after, err := d.Listeners(n.netns.Cookie); err != nil || after != before || after[0] == 0 {
		t.Errorf("listeners were %v, are %v (%v)", before, after, err)
	}
	must(t, d.Unprotect(ProtectedPort{1 << 60, 1}))
	must(t, d.RemoveNetns(1<<60))
}

func FuzzAddress(f *testing.F) {
	f.Add(make([]byte, 16))
	f.Add(netip.MustParseAddr("::ffff:192.0.2.1").AsSlice())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != 16 {
			return
		}
		ip := netip.AddrFrom16([16]byte(b))
		if got := abi.AddressOf(ip).Addr(); got != ip.Unmap() {
			t.Errorf("%s becomes %s", ip, got)
		}
		w := words(ip)
		if binary.NativeEndian.Uint32(b[12:]) != w[3] {
			t.Errorf("%s is not in network order", ip)
		}
	})
}

// Constants that the C preprocessor keeps to itself.
func TestSlotsFitTheListenersMap(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	if want := ownSlots*n.maps.Netns.MaxEntries() + serverSlots*n.maps.Protected.MaxEntries(); n.maps.Listeners.MaxEntries() != want {
		t.Errorf("the listeners map has %d slots, %d are given out", n.maps.Listeners.MaxEntries(), want)
	}
	header, err := os.ReadFile("../../bpf/include/abi.h")
	must(t, err)
	for name, want := range map[string]uint64{"SERVER_SLOTS": serverSlots, "EGRESS_FIXED": egressFixed, "MAX_LEVELS": deepest, "USAGE_TOTAL": usageTotal} {
		m := regexp.MustCompile(`(?m)^#define ` + name + ` (\S+)$`).FindSubmatch(header)
		if m == nil {
			t.Errorf("abi.h has no %s", name)
			continue
		}
		if got, err := strconv.ParseUint(string(m[1]), 0, 64); err != nil || got != want {
			t.Errorf("%s is %s in C, %d in Go", name, m[1], want)
		}
	}
}

func TestForeignListenerIsNotOurs(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	l := n.netns.Listen(t, "tcp4", netip.MustParseAddrPort("127.0.0.1:15006"))
	raw, err := l.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		if err := n.SetListener(n.netns.Cookie, ListenerInbound, 4, int(fd)); err == nil {
			t.Error("a listener of another cgroup was taken for ours")
		}
	}))
}
