// SPDX-License-Identifier: Apache-2.0

// Package loader loads the kernel half, attaches it, pins it so that it
// outlives the agent, and takes it over when the agent comes back. It knows
// programs and links; what the maps mean is agent/datapath's.
package loader

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// layoutVersion is LAYOUT_VERSION of bpf/include/abi.h.
const layoutVersion = 1

// DefaultPinDir is where the links and maps are pinned.
const DefaultPinDir = "/sys/fs/bpf/sallyport"

// Errors that a caller tells apart.
var (
	// ErrLayout means that the pins were made by a version with other
	// records.
	ErrLayout = errors.New("pins of another layout version")
	// ErrBusy means that another agent is alive on the pin directory or the
	// cgroup root.
	ErrBusy = errors.New("another agent is running")
)

// Options say where the kernel half goes. The zero value of a field is its
// default.
type Options struct {
	PinDir string // on bpffs, which is mounted there if need be
	// CgroupRoot is the cgroup2 directory whose sockets are watched; the
	// agent's own leaf must be beneath it. Default: the root of the hierarchy.
	CgroupRoot string
	// FlowEntries is how many connections the flow map holds, 131072 by
	// default. It changes only after an uninstall.
	FlowEntries uint32
	Logger      *slog.Logger
}

// Kernel is the loaded kernel half.
type Kernel struct {
	maps   bpf.KernelMaps
	forget *ebpf.Program
	adopt  *ebpf.Program // nil where the kernel refuses it

	spec  *ebpf.CollectionSpec
	dir   string
	root  string
	log   *slog.Logger
	locks []*os.File
	took  bool
	lost  []string
}

// Open loads and attaches the kernel half, or takes over what an earlier
// agent pinned: the maps stay, the links are updated in place to this
// binary's programs. Where it returns an error, nothing that it attached is
// left.
func Open(o Options) (*Kernel, error) {
	if o.PinDir == "" {
		o.PinDir = DefaultPinDir
	}
	if o.FlowEntries == 0 {
		o.FlowEntries = 131072
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.CgroupRoot == "" {
		mount, err := CgroupMount()
		if err != nil {
			return nil, err
		}
		o.CgroupRoot = mount
	}
	k := &Kernel{dir: o.PinDir, root: o.CgroupRoot, log: o.Logger}
	if err := k.open(o); err != nil {
		err = errors.Join(err, k.Close())
		os.Remove(o.PinDir) //nolint:errcheck // goes where it is empty: made here, and nothing pinned
		return nil, err
	}
	return k, nil
}

func (k *Kernel) open(o Options) (err error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return fmt.Errorf("raise memlock limit: %w", err)
	}
	if err := mountBPF(k.dir, k.log); err != nil {
		return err
	}
	if err := k.lock(); err != nil {
		return err
	}
	if k.spec, err = bpf.LoadKernel(); err != nil {
		return fmt.Errorf("read kernel object: %w", err)
	}
	if err := sizeFlows(k.spec, o.FlowEntries); err != nil {
		return err
	}
	version, found, err := readLayout(k.dir)
	switch {
	case err != nil:
		return err
	case found && version != layoutVersion:
		return fmt.Errorf("take over %s: %w: it has %d, this binary %d: run 'sallyport agent uninstall' and start again",
			k.dir, ErrLayout, version, layoutVersion)
	case found:
		return k.takeOver()
	}
	return k.install()
}

// sizeFlows leaves an eighth above what is given out, for connects that are
// under way when the limit is reached.
func sizeFlows(spec *ebpf.CollectionSpec, entries uint32) error {
	const most = 1 << 24
	if entries < 64 || entries > most {
		return fmt.Errorf("size flow map: %d entries are not within 64 and %d", entries, most)
	}
	spec.Maps["flow"].MaxEntries = entries + max(entries/8, 8)
	return nil
}

// lock makes this the only agent on its pin directory and its cgroup root
// for as long as it lives.
func (k *Kernel) lock() error {
	for _, dir := range []string{k.dir, k.root} {
		f, err := os.Open(dir)
		if err != nil {
			return fmt.Errorf("lock %s: %w", dir, err)
		}
		k.locks = append(k.locks, f)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			if errors.Is(err, unix.EWOULDBLOCK) {
				return fmt.Errorf("lock %s: %w: stop it, or give this one another pinDir and cgroupRoot", dir, ErrBusy)
			}
			return fmt.Errorf("lock %s: %w", dir, err)
		}
	}
	return nil
}

// install loads everything anew. The layout pin is written last: without it
// a directory is a leftover of an install that did not end.
func (k *Kernel) install() (err error) {
	if err := removePins(k.dir, nil); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removePins(k.dir, nil))
		}
	}()
	for _, sub := range subdirs {
		if err := os.Mkdir(filepath.Join(k.dir, sub), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	programs, err := k.load(nil)
	if err != nil {
		return err
	}
	defer programs.Close()
	for name, m := range k.named() {
		if err := m.Pin(filepath.Join(k.dir, "maps", name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	if err := k.attachAll(programs); err != nil {
		return err
	}
	return writeLayout(k.dir)
}

// takeOver reuses the pinned maps and moves every link to the programs of
// this binary.
func (k *Kernel) takeOver() error {
	k.took = true
	pinned := make(map[string]*ebpf.Map)
	defer func() {
		for _, m := range pinned {
			m.Close()
		}
	}()
	for name, spec := range k.spec.Maps {
		if name == ".rodata" {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(k.dir, "maps", name), nil)
		if err != nil {
			return fmt.Errorf("take over map %s: %w: run 'sallyport agent uninstall' and start again", name, err)
		}
		pinned[name] = m
		spec.MaxEntries = m.MaxEntries()
	}
	programs, err := k.load(pinned)
	if err != nil {
		return err
	}
	defer programs.Close()
	if err := k.attachAll(programs); err != nil {
		return err
	}
	return k.takeOverInstances()
}

type programs struct {
	*ebpf.Collection
	mkdir *ebpf.Collection // nil where the kernel refuses it
}

func (p *programs) Close() {
	p.Collection.Close()
	if p.mkdir != nil {
		p.mkdir.Close()
	}
}

// load loads the programs of which there is one, onto maps, or onto new
// ones.
func (k *Kernel) load(maps map[string]*ebpf.Map) (*programs, error) {
	spec := k.spec.Copy()
	for name := range spec.Programs {
		if _, single := cgroupHooks[name]; !single && name != "forget" {
			delete(spec.Programs, name)
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: maps})
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", explain(err))
	}
	if err := c.Assign(&k.maps); err != nil {
		c.Close()
		return nil, err
	}
	k.forget = c.DetachProgram("forget")
	p := &programs{Collection: c}
	if p.mkdir, err = k.instance([]string{"cgroup_mkdir"}, nil); err != nil {
		k.lost = append(k.lost, "a workload that is started again is known only after the next scan: "+err.Error())
		k.log.Warn("cgroup_mkdir is not available", "error", err)
	}
	if adopt, err := k.instance([]string{"adopt"}, nil); err == nil {
		k.adopt = adopt.DetachProgram("adopt")
		adopt.Close()
	} else {
		k.lost = append(k.lost, "sockets that a workload made before it was known are refused: "+err.Error())
		k.log.Warn("adopt is not available", "error", err)
	}
	return p, nil
}

// instance loads one more copy of programs, with constants of its own, on
// the shared maps.
func (k *Kernel) instance(names []string, constants map[string]any) (*ebpf.Collection, error) {
	spec := k.spec.Copy()
	keep := make(map[string]*ebpf.ProgramSpec)
	for _, name := range names {
		keep[name] = spec.Programs[name]
	}
	spec.Programs = keep
	for name, value := range constants {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: k.named()})
	if err != nil {
		return nil, fmt.Errorf("load %v: %w", names, explain(err))
	}
	return c, nil
}

// explain keeps the end of a verifier's log, which holds the cause.
func explain(err error) error {
	if ve, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		return errors.New(strings.TrimSpace(fmt.Sprintf("%-3v", ve))) // its last lines alone
	}
	return err
}

// TookOver says whether Open found and took over an earlier agent's pins.
func (k *Kernel) TookOver() bool { return k.took }

// Lost says what this kernel cannot do, one sentence each.
func (k *Kernel) Lost() []string { return k.lost }

// Maps returns the maps, for agent/datapath.
func (k *Kernel) Maps() *bpf.KernelMaps { return &k.maps }

// Forget returns the program that removes a flow entry, for agent/datapath.
func (k *Kernel) Forget() *ebpf.Program { return k.forget }

// Adopt tags the sockets that were made before their cgroup had an identity,
// as they would have been tagged when they were made. It looks at every open
// file of the machine. Where the kernel has no such program (see Lost) it
// does nothing.
func (k *Kernel) Adopt() error {
	if k.adopt == nil {
		return nil
	}
	l, err := link.AttachIter(link.IterOptions{Program: k.adopt})
	if err != nil {
		return fmt.Errorf("adopt sockets: %w", err)
	}
	defer l.Close()
	it, err := l.Open()
	if err != nil {
		return fmt.Errorf("adopt sockets: %w", err)
	}
	defer it.Close()
	// The program writes nothing; reading is what runs it.
	if _, err := io.Copy(io.Discard, it); err != nil {
		return fmt.Errorf("adopt sockets: %w", err)
	}
	return nil
}

// PinDir returns where everything is pinned.
func (k *Kernel) PinDir() string { return k.dir }

// CgroupRoot returns the cgroup2 directory whose sockets are watched.
func (k *Kernel) CgroupRoot() string { return k.root }

// Close lets go of the kernel half and leaves it attached: what was enforced
// stays enforced.
func (k *Kernel) Close() error {
	var errs []error
	for _, m := range k.named() {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	k.maps = bpf.KernelMaps{}
	if k.forget != nil {
		errs = append(errs, k.forget.Close())
		k.forget = nil
	}
	if k.adopt != nil {
		errs = append(errs, k.adopt.Close())
		k.adopt = nil
	}
	for _, f := range k.locks {
		errs = append(errs, f.Close())
	}
	k.locks = nil
	return errors.Join(errs...)
}

// named returns the pinned maps by name.
func (k *Kernel) named() map[string]*ebpf.Map {
	m := &k.maps
	return map[string]*ebpf.Map{
		"claimed": m.Claimed, "control": m.Control, "counters": m.Counters, "egress": m.Egress,
		"event_windows": m.EventWindows, "events": m.Events, "flow": m.Flow, "generations": m.Generations,
		"identity_by_cgroup": m.IdentityByCgroup, "identity_by_path": m.IdentityByPath, "listeners": m.Listeners,
		"listening": m.Listening, "netns": m.Netns, "numbers": m.Numbers, "protected": m.Protected,
		"sample_window": m.SampleWindow, "sampled": m.Sampled, "samples": m.Samples, "scratch": m.Scratch,
		"socket_tags": m.SocketTags, "usage": m.Usage, "verdict": m.Verdict,
	}
}
