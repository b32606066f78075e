// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/sallyport-dev/sallyport/userspace/tpm/tpmtest"
)

func open(t testing.TB, address string) *TPM {
	t.Helper()
	d, err := Open(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func key(t testing.TB, d *TPM, path string) *Key {
	t.Helper()
	k, err := d.Key(path)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustSign(t testing.TB, k *Key, text string) {
	t.Helper()
	digest := sha256.Sum256([]byte(text))
	sig, err := k.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Fatal("the signature does not verify")
	}
}

func TestKeySurvivesRestart(t *testing.T) {
	soft := tpmtest.Start(t)
	path := filepath.Join(t.TempDir(), "ca.tpmkey")
	d := open(t, "unix:"+soft.Socket)
	first := key(t, d, path)
	mustSign(t, first, "one")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("key file: %v, %v; want mode 0600", info, err)
	}

	// The TPM reboots under a live process: its handle is gone, the key not.
	soft.Restart(t)
	mustSign(t, first, "two")

	// The process starts again.
	d.Close()
	digest := sha256.Sum256(nil)
	if _, err := first.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("sign after close: %v; want os.ErrClosed", err)
	}
	second := key(t, open(t, soft.Socket), path)
	if !second.Public().(*ecdsa.PublicKey).Equal(first.Public()) {
		t.Fatal("another key after the restart")
	}
	mustSign(t, second, "three")
}

func TestForeignTPM(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.tpmkey")
	key(t, open(t, tpmtest.Start(t).Socket), path)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = open(t, tpmtest.Start(t).Socket).Key(path)
	if !errors.Is(err, ErrForeignKey) {
		t.Fatalf("key of another TPM: %v; want ErrForeignKey", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Fatalf("the key file was touched: %v", err)
	}
}

// A killed process leaves its objects in the three slots of a raw TPM.
func TestStaleHandlesAreFlushed(t *testing.T) {
	soft := tpmtest.Start(t)
	link, err := linuxudstpm.Open(soft.Socket)
	if err != nil {
		t.Fatal(err)
	}
	leak := func() error {
		_, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
		}.Execute(link)
		return err
	}
	full := false
	for range 10 {
		if err := leak(); errors.Is(err, tpm2.TPMRCObjectMemory) {
			full = true
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if !full {
		t.Fatal("the TPM never ran out of slots: the test shows nothing")
	}
	k := key(t, open(t, soft.Socket), filepath.Join(t.TempDir(), "k"))
	mustSign(t, k, "x")

	// Nothing but the key itself stays in the TPM.
	if n := transientObjects(t, link); n != 1 {
		t.Fatalf("%d objects in the TPM, want 1", n)
	}

	// And a neighbour that fills the slots after that costs no signature.
	flushAll(t, link)
	mustSign(t, k, "y")
}

func transientObjects(t *testing.T, link transport.TPM) int {
	t.Helper()
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: transientFirst, PropertyCount: 64}.Execute(link)
	if err != nil {
		t.Fatal(err)
	}
	handles, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		t.Fatal(err)
	}
	return len(handles.Handle)
}

func flushAll(t *testing.T, link transport.TPM) {
	t.Helper()
	if err := flushTransient(link); err != nil {
		t.Fatal(err)
	}
	if n := transientObjects(t, link); n != 0 {
		t.Fatalf("%d objects after the flush", n)
	}
}

// Another object under the key's old handle must not sign in its name.
func TestHandleTakenByAnotherKey(t *testing.T) {
	soft := tpmtest.Start(t)
	dir := t.TempDir()
	a := key(t, open(t, soft.Socket), filepath.Join(dir, "a"))
	b := key(t, open(t, soft.Socket), filepath.Join(dir, "b")) // flushes a, as another process would
	mustSign(t, b, "b")
	mustSign(t, a, "a")
	mustSign(t, b, "b again")
}

func TestConcurrentSign(t *testing.T) {
	k := key(t, open(t, tpmtest.Start(t).Socket), filepath.Join(t.TempDir(), "k"))
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() { mustSign(t, k, "x") })
	}
	group.Wait()
}

func TestSignRefusesOtherDigests(t *testing.T) {
	k := &Key{tpm: &TPM{address: "nowhere"}}
	for _, c := range []struct {
		digest []byte
		hash   crypto.Hash
	}{{make([]byte, 48), crypto.SHA384}, {make([]byte, 20), crypto.SHA1}, {make([]byte, 31), crypto.SHA256}, {nil, crypto.SHA256}} {
		if _, err := k.Sign(nil, c.digest, c.hash); err == nil || !strings.Contains(err.Error(), "only SHA-256") {
			t.Errorf("%v of %d bytes: %v", c.hash, len(c.digest), err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "dead")
	listener, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	listener.Close()
	for name, c := range map[string]struct{ address, want string }{
		"missing":    {filepath.Join(dir, "none"), "no such file"},
		"plain file": {plain, "not a device"},
		"dead":       {dead, "connection refused"},
		"not a TPM":  {"/dev/null", ""},
	} {
		_, err := Open(c.address)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.address) {
			t.Errorf("%s: %v; want %q and the address", name, err, c.want)
		}
	}
	if _, err := os.Stat(Device); errors.Is(err, os.ErrNotExist) {
		if _, err := Open("auto"); !errors.Is(err, ErrNone) {
			t.Errorf("auto without a TPM: %v; want ErrNone", err)
		}
	}
}

// A TPM that hangs costs a caller its patience, not the process a
// goroutine each.
func TestHangingTPM(t *testing.T) {
	hang, release := make(chan struct{}), make(chan struct{})
	d := &TPM{address: "hanging", slot: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- d.use(ctx, func() error { close(hang); <-release; return nil }) }()
	<-hang
	short, stop := context.WithTimeout(t.Context(), time.Millisecond)
	defer stop()
	if err := d.use(short, func() error { t.Error("ran beside the first"); return nil }); !errors.Is(err, ErrBusy) {
		t.Errorf("second use: %v; want ErrBusy", err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, ErrBusy) {
		t.Errorf("first use, given up: %v; want ErrBusy", err)
	}
	close(release)
	if err := d.use(t.Context(), func() error { return nil }); err != nil {
		t.Errorf("use after the TPM came back: %v", err)
	}
}

func TestOwnerPassword(t *testing.T) {
	soft := tpmtest.Start(t)
	link, err := linuxudstpm.Open(soft.Socket)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("secret")},
	}.Execute(link)
	if err != nil {
		t.Fatal(err)
	}
	_, err = open(t, soft.Socket).Key(filepath.Join(t.TempDir(), "k"))
	if err == nil || !strings.Contains(err.Error(), "owner hierarchy has a password") {
		t.Fatalf("%v; want a word on the owner's password", err)
	}
}

func TestInfo(t *testing.T) {
	info, err := open(t, tpmtest.Start(t).Socket).Info(t.Context())
	if err != nil || info.Manufacturer != "IBM" || !strings.HasPrefix(info.Vendor, "SW") {
		t.Fatalf("%+v, %v; want swtpm's IBM and SW...", info, err)
	}
}

func sampleBlob(t testing.TB) []byte {
	t.Helper()
	// The public area of a key as swtpm makes it, without a TPM: any point on
	// the curve does.
	public := keyTemplate
	x := []byte{0x6b, 0x17, 0xd1, 0xf2, 0xe1, 0x2c, 0x42, 0x47, 0xf8, 0xbc, 0xe6, 0xe5, 0x63, 0xa4, 0x40, 0xf2, 0x77, 0x03, 0x7d, 0x81, 0x2d, 0xeb, 0x33, 0xa0, 0xf4, 0xa1, 0x39, 0x45, 0xd8, 0x98, 0xc2, 0x96}
	y := []byte{0x4f, 0xe3, 0x42, 0xe2, 0xfe, 0x1a, 0x7f, 0x9b, 0x8e, 0xe7, 0xeb, 0x4a, 0x7c, 0x0f, 0x9e, 0x16, 0x2b, 0xce, 0x33, 0x57, 0x6b, 0x31, 0x5e, 0xce, 0xcb, 0xb6, 0x40, 0x68, 0x37, 0xbf, 0x51, 0xf5}
	public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}})
	return encodeBlob(tpm2.New2B(public), tpm2.TPM2BPrivate{Buffer: []byte("wrapped")})
}

func TestDecodeBlob(t *testing.T) {
	good := sampleBlob(t)
	if _, _, err := decodeBlob(good); err != nil {
		t.Fatal(err)
	}
	outside := keyTemplate
	outside.ObjectAttributes.SensitiveDataOrigin = false
	for name, b := range map[string][]byte{
		"empty":          nil,
		"magic alone":    []byte(blobMagic),
		"other magic":    append([]byte("x"), good[1:]...),
		"cut":            good[:len(good)-1],
		"more":           append(bytes.Clone(good), 0),
		"huge":           append(bytes.Clone(good), make([]byte, blobMax)...),
		"made elsewhere": encodeBlob(tpm2.New2B(outside), tpm2.TPM2BPrivate{Buffer: []byte("x")}),
	} {
		if _, _, err := decodeBlob(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzDecodeBlob(f *testing.F) {
	f.Add(sampleBlob(f))
	f.Add([]byte(blobMagic + "\x00\x01a\x00\x01b"))
	f.Fuzz(func(t *testing.T, b []byte) {
		pub, private, err := decodeBlob(b)
		if err == nil && !bytes.Equal(encodeBlob(pub, private), b) {
			t.Errorf("not the one form of its content: %x", b)
		}
	})
}

func BenchmarkSignSwtpm(b *testing.B) {
	k := key(b, open(b, tpmtest.Start(b).Socket), filepath.Join(b.TempDir(), "k"))
	digest := sha256.Sum256([]byte("x"))
	for b.Loop() {
		if _, err := k.Sign(nil, digest[:], crypto.SHA256); err != nil {
			b.Fatal(err)
		}
	}
}

// Two that start at once over a TPM without a resource manager each free what
// they find, which may be the other's: both get their keys all the same.
func TestTwoStartAtOnce(t *testing.T) {
	soft := tpmtest.Start(t)
	dir := t.TempDir()
	for round := range 20 {
		var wg sync.WaitGroup
		for who := range 2 {
			wg.Go(func() {
				neighbour, err := Open(soft.Socket)
				if err != nil {
					t.Error(err)
					return
				}
				defer neighbour.Close()
				k, err := neighbour.Key(filepath.Join(dir, fmt.Sprint("k", who)))
				if err != nil {
					t.Errorf("round %d: %v", round, err)
					return
				}
				if _, err := k.Sign(nil, make([]byte, 32), crypto.SHA256); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		wg.Wait()
	}
}
