// SPDX-License-Identifier: Apache-2.0

// Package tpm keeps signing keys in a TPM 2.0: it opens the TPM, creates a
// P-256 key that cannot leave it, stores the wrapped key in a file and
// signs with it. Commands go one at a time and each waits a bounded time.
//
// Structures and commands are those of the TCG's TPM 2.0 Library, parts 2
// and 3; the storage primary is the reference ECC template of the TCG
// Provisioning Guidance, derived anew from the owner seed at every load, so
// that nothing is kept in the TPM's own persistent memory.
package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// Device is the kernel's resource-managed TPM device (Linux 4.12), which
// Open takes for "auto".
const Device = "/dev/tpmrm0"

// Sentinels that callers branch on.
var (
	// ErrNone says that this machine has no TPM (only for "auto").
	ErrNone = errors.New("this machine has no TPM")
	// ErrForeignKey says that a stored key was made by another TPM, or by
	// this one before it was cleared.
	ErrForeignKey = errors.New("the key belongs to another TPM, or this TPM was cleared since it was made")
	// ErrBusy says that the TPM did not become free, or did not answer, in
	// the time that the caller could wait.
	ErrBusy = errors.New("the TPM does not answer in time")
)

// commandTime bounds one use of the TPM: a slow hardware TPM needs about a
// second to create a key and tens of milliseconds to sign.
const commandTime = 15 * time.Second

// TPM is an open TPM. It is safe for concurrent use; uses are serialised.
type TPM struct {
	address string
	slot    chan struct{} // holds one token: who has it speaks to the TPM
	link    transport.TPMCloser
	closed  bool // guarded by slot
}

// Info names the maker of a TPM.
type Info struct {
	Manufacturer string // TCG vendor ID, such as "INTC", "IBM"
	Vendor       string // the vendor's own text, such as "SW   TPM"
}

// Open opens the TPM at address: "auto" (Device where it exists, else
// ErrNone), the path of a character device, or the path of a unix socket on
// which swtpm answers, with or without the prefix "unix:". Objects that a
// killed process left behind on a socket are flushed: a raw TPM has three
// slots, and their leak shows as TPM_RC_OBJECT_MEMORY at the next start.
func Open(address string) (*TPM, error) {
	if address == "auto" {
		if _, err := os.Stat(Device); errors.Is(err, fs.ErrNotExist) {
			return nil, ErrNone
		}
		address = Device
	}
	t := &TPM{address: strings.TrimPrefix(address, "unix:"), slot: make(chan struct{}, 1)}
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	if err := t.use(ctx, func() error { return t.connect() }); err != nil {
		return nil, fmt.Errorf("open TPM %s: %w", address, err)
	}
	return t, nil
}

// Address returns the path that the TPM was opened at.
func (t *TPM) Address() string { return t.address }

// Close closes the connection. Keys of this TPM cannot sign any more.
func (t *TPM) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	return t.use(ctx, func() error {
		t.closed = true
		if t.link == nil {
			return nil
		}
		link := t.link
		t.link = nil
		return link.Close()
	})
}

// Info asks the TPM who made it.
func (t *TPM) Info(ctx context.Context) (Info, error) {
	var info Info
	err := t.use(ctx, func() error {
		if err := t.connect(); err != nil {
			return err
		}
		first, last := uint32(tpm2.TPMPTManufacturer), uint32(tpm2.TPMPTVendorString1)+3
		rsp, err := tpm2.GetCapability{
			Capability: tpm2.TPMCapTPMProperties, Property: first, PropertyCount: last - first + 1,
		}.Execute(t.link)
		if err != nil {
			return err
		}
		properties, err := rsp.CapabilityData.Data.TPMProperties()
		if err != nil {
			return err
		}
		for _, p := range properties.TPMProperty {
			var word [4]byte
			binary.BigEndian.PutUint32(word[:], p.Value)
			text := strings.TrimRight(string(word[:]), "\x00 ")
			switch {
			case p.Property == tpm2.TPMPTManufacturer:
				info.Manufacturer = text
			case uint32(p.Property) <= last:
				info.Vendor += strings.TrimRight(string(word[:]), "\x00")
			}
		}
		return nil
	})
	if err != nil {
		return Info{}, fmt.Errorf("ask TPM %s for its maker: %w", t.address, err)
	}
	return info, nil
}

// use runs f alone on the TPM. A TPM command cannot be broken off, so f
// runs on a goroutine that keeps the slot until the TPM has answered; the
// caller stops waiting when ctx ends. At most one such goroutine exists.
func (t *TPM) use(ctx context.Context, f func() error) error {
	select {
	case t.slot <- struct{}{}:
	case <-ctx.Done():
		return ErrBusy
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-t.slot }()
		if t.closed {
			done <- os.ErrClosed
			return
		}
		done <- f()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ErrBusy
	}
}

// connect makes the link if there is none. The caller holds the slot.
func (t *TPM) connect() error {
	if t.link != nil {
		return nil
	}
	info, err := os.Stat(t.address)
	if err != nil {
		return err
	}
	socket := info.Mode()&fs.ModeSocket != 0
	open := linuxtpm.Open
	if socket {
		open = linuxudstpm.Open
	}
	link, err := open(t.address)
	if err != nil {
		return err
	}
	if err := flushTransient(link); err != nil {
		link.Close()
		return err
	}
	t.link = link
	return nil
}

// disconnect drops the link after an error that a fresh one may cure. The
// caller holds the slot.
func (t *TPM) disconnect() {
	if t.link != nil {
		t.link.Close()
		t.link = nil
	}
}

// transientFirst is the first transient handle (TPM 2.0 part 2, 7.2).
const transientFirst = 0x80000000

// flushTransient also is the first word spoken: it fails clearly on what is
// not a TPM 2.0. Behind a resource manager it sees this connection's own
// objects only, that is none.
func flushTransient(link transport.TPM) error {
	rsp, err := tpm2.GetCapability{
		Capability: tpm2.TPMCapHandles, Property: transientFirst, PropertyCount: 64,
	}.Execute(link)
	if errors.Is(err, tpm2.TPMRCInitialize) {
		return fmt.Errorf("the TPM was not started (TPM2_Startup); for swtpm add --flags startup-clear: %w", err)
	}
	if err != nil {
		return fmt.Errorf("list transient objects: %w", err)
	}
	handles, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return fmt.Errorf("list transient objects: %w", err)
	}
	for _, h := range handles.Handle {
		// One that is not there any more was freed by its owner meanwhile.
		if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(link); err != nil && !errors.Is(err, tpm2.TPMRCHandle) {
			return fmt.Errorf("flush transient object %#x: %w", uint32(h), err)
		}
	}
	return nil
}
