// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/openfga/openfga/pkg/logger"
	"github.com/openfga/openfga/pkg/server"
	"github.com/openfga/openfga/pkg/storage"
	"github.com/openfga/openfga/pkg/storage/migrate"
	"github.com/openfga/openfga/pkg/storage/sqlcommon"
	"github.com/openfga/openfga/pkg/storage/sqlite"

	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

// Built says whether the relation engine is part of this binary.
const Built = relations.Built

const (
	storeFile = "relation.db"
	// maxConnections to the store, of at most 256 KiB of cache each. One
	// question has been seen to hold 25.
	maxConnections = 512
	// engineTTL is how long OpenFGA's own caches hold what they read.
	engineTTL = 10 * time.Second
	// settle is how long after a write the engine is asked past its caches:
	// its TTL, and as much again as a question that began before the write
	// may take to fill them.
	settle = 3 * engineTTL
)

// Engine answers questions about relations. All its methods are safe for
// concurrent use. The zero Engine is not usable; see Open and Unavailable.
type Engine struct {
	opt    Options
	db     *sql.DB
	lock   *os.File // held as long as the store is ours
	tuples *sqlite.Datastore
	fga    *server.Server
	broken error // why nothing can be answered, nil for an open engine
	now    func() time.Time
	looks  time.Duration // how often the store of an engine elsewhere is looked for

	models   atomic.Pointer[modelSet]
	cache    cache
	slots    chan struct{} // one for each question that the engine may work on
	flights  flights
	checks   atomic.Uint64
	failures atomic.Uint64

	write   sync.Mutex // of those who change tuples or models
	open    atomic.Bool
	closing sync.RWMutex // keeps a question from beginning while open ends
	work    sync.WaitGroup
	tails   sync.WaitGroup // of engines elsewhere
}

type modelSet struct {
	byName map[string]*model
	only   *model // nil unless there is exactly one
}

// find returns the model of that name, the only one for "", or nil.
func (s *modelSet) find(name string) *model {
	if name == "" {
		return s.only
	}
	return s.byName[name]
}

// migrations guards OpenFGA's migrations, which keep their settings in
// globals of the process.
var migrations sync.Mutex

// Open opens the store in the state folder, making or upgrading it where
// needed. A store that is damaged or cannot be read is left as it is and an
// error: an empty one in its place would forget what is blocked. Use
// Unavailable to go on without it, denying.
func Open(ctx context.Context, opt Options) (*Engine, error) {
	opt.defaults()
	path := filepath.Join(opt.StateDir, storeFile)
	// What another process wrote would not void our answers.
	lock, err := statefile.Hold(ctx, path+".lock")
	if err != nil {
		return nil, fmt.Errorf("lock relation store %s: %w", path, err)
	}
	db, err := openStore(ctx, path)
	if err != nil {
		lock.Close()
		if errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("open relation store %s: %w", path, err)
		}
		return nil, fmt.Errorf("open relation store %s: %w; put a backup in its place, or move it away to begin with no relations", path, err)
	}
	e := newEngine(opt)
	e.db, e.lock = db, lock
	store, err := sqlite.NewWithDB(db, sqlcommon.NewConfig(sqlcommon.WithMaxTypesPerAuthorizationModel(relations.MaxTypes)))
	if err == nil {
		e.tuples = store
		e.fga, err = newServer(store, opt)
	}
	if err != nil {
		db.Close()
		lock.Close()
		return nil, fmt.Errorf("start relation engine: %w", err)
	}
	e.open.Store(true)
	return e, nil
}

// Unavailable returns an Engine that denies every question because of err.
func Unavailable(err error) *Engine {
	e := newEngine(Options{})
	e.broken = fmt.Errorf("%w: %w", errUnavailable, err)
	return e
}

func newEngine(opt Options) *Engine {
	opt.defaults()
	e := &Engine{opt: opt, now: time.Now, looks: storeEvery, slots: make(chan struct{}, opt.Parallel)}
	e.cache.init(opt.CacheEntries)
	e.flights.init()
	e.models.Store(&modelSet{})
	return e
}

func newServer(store storage.OpenFGADatastore, opt Options) (*server.Server, error) {
	return server.NewServerWithOpts(
		server.WithDatastore(store),
		server.WithLogger(logger.NewNoopLogger()),
		server.WithContinuationTokenSerializer(sqlcommon.NewSQLContinuationTokenSerializer()),
		server.WithRequestTimeout(opt.Timeout),
		server.WithListObjectsDeadline(opt.Timeout),
		server.WithListObjectsMaxResults(MaxListed),
		server.WithMaxConcurrentReadsForCheck(8),
		server.WithMaxConcurrentReadsForListObjects(8),
		server.WithMaxAuthorizationModelSizeInBytes(2*relations.MaxSize),
		server.WithAuthorizationModelCacheSize(relations.MaxModels),
		server.WithTypesystemCacheSize(relations.MaxModels),
		server.WithCheckCacheLimit(10_000),
		server.WithCheckQueryCacheEnabled(true),
		server.WithCheckQueryCacheTTL(engineTTL),
	)
}

// openStore opens the sqlite file, readable by us alone, checks it and brings
// its schema up to date.
func openStore(ctx context.Context, path string) (*sql.DB, error) {
	if strings.ContainsAny(path, "?#%") {
		return nil, errors.New("its path holds one of ? # %")
	}
	fresh, err := makeStore(path)
	if err != nil {
		return nil, err
	}
	// Temporary tables stay in memory: this process opens no other folder.
	dsn := path + "?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(5000)&_pragma=temp_store(MEMORY)&_pragma=cache_size(-256)"
	dsn, err = sqlite.PrepareDSN(dsn)
	if err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, err
	}
	// A question keeps connections while it asks for more: were there fewer
	// than all that run at once can want, they would wait for each other.
	db.SetMaxOpenConns(maxConnections)
	db.SetMaxIdleConns(16)
	if err := prepareStore(ctx, db, dsn, fresh); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

func makeStore(path string) (fresh bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		return true, f.Close()
	}
	if !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		return false, errors.New("it is not a regular file")
	}
	return info.Size() == 0, nil
}

func prepareStore(ctx context.Context, db *sql.DB, dsn string, fresh bool) error {
	if !fresh {
		var verdict string
		if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&verdict); err != nil {
			return fmt.Errorf("check it: %w", err)
		}
		if verdict != "ok" {
			return fmt.Errorf("it is damaged: %s", verdict)
		}
	}
	migrations.Lock()
	defer migrations.Unlock()
	err := migrate.RunMigrations(migrate.MigrationConfig{
		Engine: "sqlite", URI: dsn, Timeout: 10 * time.Second, PingTimeout: 5 * time.Second, Logger: logger.NewNoopLogger(),
	})
	if err != nil {
		return fmt.Errorf("upgrade its schema: %w", err)
	}
	if _, err := db.ExecContext(ctx, markSchema); err != nil {
		return fmt.Errorf("upgrade its schema: %w", err)
	}
	return nil
}

// Close ends the engine once the questions that it works on are answered.
func (e *Engine) Close() error {
	e.write.Lock()
	defer e.write.Unlock()
	e.closing.Lock()
	was := e.open.Swap(false)
	e.closing.Unlock()
	if !was {
		return nil
	}
	for _, m := range e.models.Swap(&modelSet{}).byName {
		m.abandon()
	}
	e.tails.Wait()
	e.work.Wait()
	e.fga.Close() // closes the store too
	return e.lock.Close()
}

// ready returns why nothing can be done, nil if something can.
func (e *Engine) ready() error {
	if e.broken != nil {
		return e.broken
	}
	if !e.open.Load() {
		return errUnavailable
	}
	return nil
}

// Status returns the engine's state.
func (e *Engine) Status() Status {
	s := Status{Models: len(e.models.Load().byName), Checks: e.checks.Load(), Errors: e.failures.Load()}
	if err := e.ready(); err != nil {
		s.Problem = err.Error()
		return s
	}
	s.Ready = true
	var problems []string
	for _, name := range slices.Sorted(maps.Keys(e.models.Load().byName)) {
		if m := e.models.Load().byName[name]; m != nil && m.remote != nil {
			if why := m.remote.problem.Load(); why != nil {
				problems = append(problems, "engine of "+name+" at "+m.remote.spec.Remote.Address+": "+*why)
			}
		}
	}
	s.Problem = strings.Join(problems, "; ")
	return s
}
