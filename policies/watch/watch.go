// SPDX-License-Identifier: Apache-2.0

// Package watch keeps a plan in step with a folder of policy files. A set
// that does not build changes nothing: the last good one stays in force, and
// is kept on disk, so that a restart into a broken folder still protects.
package watch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
)

// Defaults of Options.
const (
	DefaultDebounce = 200 * time.Millisecond
	DefaultPoll     = 10 * time.Second
)

// missingPoll is how often a missing folder is looked for, at most.
const missingPoll = time.Second

// maxSettles is how often a folder in another's place is waited for.
const maxSettles = 10

// thereAgain is logged when the folder has come, or come back.
const thereAgain = "the policy folder is there"

// openForWriting is logged each time that the folder is not read for it.
const openForWriting = "a policy file is open for writing; it is waited for"

// Options say what is watched.
type Options struct {
	// Dir is the policy folder. It need not be there yet.
	Dir string
	// StateDir is the folder in which the last good set is kept; "" keeps
	// none.
	StateDir string
	// Build makes a plan of files, nil where a problem is an error.
	Build func([]load.File) (*compile.Plan, []load.Problem)
	// Logger is told of every change; the problems themselves are for who
	// takes the events.
	Logger *slog.Logger
	// Debounce is how long the folder must be quiet before it is read;
	// DefaultDebounce if 0. One that is never quiet is read after ten of
	// them, one in which a file is still open for writing after a hundred.
	Debounce time.Duration
	// Poll is how often the folder is read without a notification, which
	// catches what inotify cannot see; DefaultPoll if 0.
	Poll time.Duration
}

// Event is the state of things after the folder was read and something about
// it had changed.
type Event struct {
	// Plan is in force, nil while there has been no good set at all.
	Plan *compile.Plan
	// Files are those that Plan was made of.
	Files []load.File
	// Problems are those of the folder as it is now. Errors among them mean
	// that it is not what is in force.
	Problems []load.Problem
	// FromLastGood says that Plan is of the set that was kept on disk,
	// because the folder has held no good one since the start.
	FromLastGood bool
}

// Rejected says whether the folder holds a set that is not in force.
func (e *Event) Rejected() bool { return load.HasErrors(e.Problems) }

// Watcher watches one folder.
type Watcher struct {
	opt    Options
	events chan Event
	store  store

	current Event
	// What the folder held when it was read last, to tell changes.
	seenDigest   string
	seenProblems []load.Problem
	due          time.Time // when time alone makes the same set say something else; zero for never
}

// New returns a watcher; Run makes it work.
func New(opt Options) *Watcher {
	if opt.Debounce <= 0 {
		opt.Debounce = DefaultDebounce
	}
	if opt.Poll <= 0 {
		opt.Poll = DefaultPoll
	}
	return &Watcher{opt: opt, events: make(chan Event, 1), store: store{dir: opt.StateDir}}
}

// Events delivers what happens. Who does not keep up gets the newest event
// alone. The first one comes soon after Run was called; the channel is
// closed when Run returns.
func (w *Watcher) Events() <-chan Event { return w.events }

// Run watches until the context is done.
func (w *Watcher) Run(ctx context.Context) {
	defer close(w.events)
	n := newNotifier(w.opt.Dir, w.opt.Logger)
	defer n.close()
	there := true
	for first := true; ; first = false {
		before, another := there, false
		// Watch first, read then: what changes in between is seen.
		there, another = n.watch()
		// Where a folder never stays the same it is read as it is.
		for range maxSettles {
			if !there || first || !another && before {
				break
			}
			w.opt.Logger.Debug(thereAgain, "folder", w.opt.Dir)
			if !w.settle(ctx, n) { // whoever makes it may not be done
				return
			}
			before = true
			there, another = n.watch() // it may be another by now
		}
		w.read(first)
		poll := w.opt.Poll
		if !there {
			poll = min(poll, missingPoll)
		}
		if !w.wait(ctx, n, poll) {
			return
		}
	}
}

// wait returns when the folder should be read again, false when the context
// is done.
func (w *Watcher) wait(ctx context.Context, n *notifier, poll time.Duration) bool {
	timer := time.NewTimer(poll)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		if !n.busy() {
			return true
		}
	case <-n.changes:
	}
	return w.settle(ctx, n)
}

// settle returns when the folder has been quiet for a while, false when the
// context is done.
func (w *Watcher) settle(ctx context.Context, n *notifier) bool {
	timer := time.NewTimer(w.opt.Debounce)
	defer timer.Stop()
	longest, patience := time.NewTimer(10*w.opt.Debounce), time.NewTimer(100*w.opt.Debounce)
	defer longest.Stop()
	defer patience.Stop()
	for {
		timer.Reset(w.opt.Debounce)
		select {
		case <-ctx.Done():
			return false
		case <-n.changes:
			continue
		case <-timer.C:
		case <-longest.C:
		case <-patience.C:
			w.opt.Logger.Warn("a policy file has been open for writing for long; the folder is read as it is", "folder", w.opt.Dir)
			return true
		}
		// Half of a file can be a good set that says less than the whole.
		if !n.busy() {
			return true
		}
		w.opt.Logger.Debug(openForWriting, "folder", w.opt.Dir)
	}
}

// read reads the folder and makes what follows from it known.
func (w *Watcher) read(first bool) {
	files, problems, err := load.ReadDir(w.opt.Dir)
	if errors.Is(err, load.ErrChanging) && !first {
		return // the next notification is on its way
	}
	if err != nil {
		problems = []load.Problem{{Message: readProblem(w.opt.Dir, err)}}
	}
	digest := ""
	if !load.HasErrors(problems) {
		digest = load.Digest(files)
	}
	due := !w.due.IsZero() && !time.Now().Before(w.due)
	if !first && !due && digest == w.seenDigest && (digest != "" || slices.Equal(problems, w.seenProblems)) {
		return
	}
	w.seenDigest, w.seenProblems = digest, problems
	var plan *compile.Plan
	w.due = time.Time{}
	if digest != "" {
		var more []load.Problem
		now := time.Now() // before Build: what it has not warned of is to come
		plan, more = w.opt.Build(files)
		if plan != nil {
			w.due = plan.Changes(now)
		}
		problems = load.Sort(slices.Concat(problems, more, w.permissions()))
	}
	if plan != nil && len(files) == 0 && w.holds(first) {
		problems = append(problems, load.Problem{Message: fmt.Sprintf(
			"the policy folder %s is empty; what is in force stays. Where nothing is meant to be protected, put a file there with only a comment", w.opt.Dir)})
	}
	if plan == nil || load.HasErrors(problems) {
		w.reject(problems, first)
	} else {
		w.accept(plan, files, problems)
	}
	w.send(w.current)
}

// holds says whether there are policies that an empty folder would take away:
// in force, or at the start kept on disk. A folder that was just made, or whose
// volume is not mounted, is no wish to protect nothing.
func (w *Watcher) holds(first bool) bool {
	if !first {
		return w.current.Plan != nil && len(w.current.Files) > 0
	}
	files, err := w.store.load()
	return err != nil || len(files) > 0
}

func readProblem(dir string, err error) string {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Sprintf("the policy folder %s is not there; make it, or set policyDir", dir)
	}
	return err.Error()
}

// permissions warns of a folder that anybody may write to.
func (w *Watcher) permissions() []load.Problem {
	info, err := os.Stat(w.opt.Dir)
	if err != nil || info.Mode().Perm()&0o002 == 0 {
		return nil
	}
	return []load.Problem{{
		Severity: load.Warning,
		Message:  fmt.Sprintf("the policy folder %s is writable by every user of this machine; chmod o-w it", w.opt.Dir),
	}}
}

// accept puts a plan in force.
func (w *Watcher) accept(plan *compile.Plan, files []load.File, problems []load.Problem) {
	if err := w.store.save(files); err != nil {
		w.opt.Logger.Error("keep the last good policy set", "error", err)
		problems = append(problems, load.Problem{Severity: load.Warning, Message: "the set is in force, but not kept for a restart: " + err.Error()})
	}
	if w.current.Plan != nil && w.current.Plan.Digest() == plan.Digest() {
		plan = w.current.Plan // back to what is in force: nothing is new
	}
	w.opt.Logger.Info("policy set in force", "digest", plan.Digest(), "files", len(files), "policies", len(plan.APIs()),
		"identities", len(plan.Identities()), "warnings", len(problems))
	w.current = Event{Plan: plan, Files: files, Problems: problems}
}

// reject leaves what is in force, at the start what was kept on disk.
func (w *Watcher) reject(problems []load.Problem, first bool) {
	w.current.Problems = problems
	if first {
		w.restore()
	}
	w.opt.Logger.Error("policy set rejected", "problems", len(problems), "kept", w.current.Plan != nil, "fromLastGood", w.current.FromLastGood)
}

// restore puts the set in force that was kept on disk.
func (w *Watcher) restore() {
	files, err := w.store.load()
	if err != nil {
		w.current.Problems = append(w.current.Problems, load.Problem{Message: err.Error()})
		w.opt.Logger.Error("restore the last good policy set", "error", err)
		return
	}
	if files == nil {
		return
	}
	plan, problems := w.opt.Build(files)
	if plan == nil {
		message := "the last good policy set is not good any more"
		if len(problems) > 0 {
			message += ": " + problems[0].String()
		}
		w.current.Problems = append(w.current.Problems, load.Problem{Message: message})
		return
	}
	w.current.Plan, w.current.Files, w.current.FromLastGood = plan, files, true
}

// send delivers an event in place of one that nobody took yet.
func (w *Watcher) send(e Event) {
	for {
		select {
		case w.events <- e:
			return
		default:
		}
		select {
		case <-w.events:
		default:
		}
	}
}
