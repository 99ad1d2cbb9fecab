package audit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/capture"
)

// LedgerConfig says what a Ledger keeps in full.
type LedgerConfig struct {
	// Window is how much time a roll-up counts. Default 10 s.
	Window time.Duration
	// Budget is how many refusals, failed handshakes and failed calls of one
	// kind are kept in full in a window; of more, one in Sample is. Defaults
	// 100 and 1,000.
	Budget, Sample int
}

func (c LedgerConfig) withDefaults() LedgerConfig {
	c.Window = cmp.Or(c.Window, 10*time.Second)
	c.Budget = cmp.Or(c.Budget, 100)
	c.Sample = cmp.Or(c.Sample, 1000)
	return c
}

const (
	// fullEvery is how often a caller, destination and rule is seen in full.
	fullEvery = 24 * time.Hour
	// maxTemplates bounds the path templates of one caller, destination and
	// rule; calls beyond them are counted under "**".
	maxTemplates = 64
	// idleWindows is after how many windows without an event a cell is free.
	idleWindows = 6
	// maxKinds bounds what is remembered of callers, destinations and rules.
	maxKinds   = 1 << 16
	shardCount = 16
)

// A Ledger keeps records in a Log and counts calls beside it. A call that was
// allowed is counted; the first of its kind in a day, and what the caller of
// Append asks for, is kept in full as well. A refusal, a failed handshake and
// a failed call is counted and kept, but of a flood only samples are. Every
// other record is kept.
//
// When Append has returned nil, the record or the count survives the death of
// the process at any instant. It is safe for concurrent use.
type Ledger struct {
	cfg   LedgerConfig
	log   *Log
	table *capture.Words
	// counts is the file of table, locked until the end; nil in memory.
	counts     *os.File
	countsName string

	shards [shardCount]shard

	// mu guards what follows, and is taken after a shard's.
	mu    sync.Mutex
	free  []int
	kinds map[kindKey]*kindSeen
	short bool // somebody was told that no cell is free

	// telling is the right to write roll-ups. It guards said: how far the log
	// tells cells by roll-ups that may not be on the disk. As long as there are
	// any, hFrom stays before them.
	telling sync.Mutex
	said    map[*cell][classes]uint64
	closed  atomic.Bool
}

// kindKey is what the first use in a day is of.
type kindKey struct {
	src, dst, rule string
	shadow         what // whole of calls
}

func (k *cellKey) kind() kindKey {
	out := kindKey{src: k.src, dst: k.dst, rule: k.rule}
	if k.what.shadow() {
		out.shadow = k.what
	}
	return out
}

type kindSeen struct {
	full      time.Time // when one was kept in full
	templates int
}

type shard struct {
	mu    sync.Mutex // guards cells and what they have outside of the file
	cells map[cellKey]*cell
	_     [64]byte // shards do not share a cache line
}

// countsSuffix makes the name of the file with the counts from the log's.
const countsSuffix = ".counts"

// OpenLedger opens the log and, beside it, the file with the counts, which has
// a fixed size. What a crash left untold is told now.
func OpenLedger(file Config, cfg LedgerConfig) (*Ledger, error) {
	log, err := Open(file)
	if err != nil {
		return nil, err
	}
	tellLeft(log, cfg)
	l, err := countIn(log, file.Path+countsSuffix, cfg)
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	return l, nil
}

// countIn makes a ledger of a log and a file with counts.
func countIn(log *Log, name string, cfg LedgerConfig) (*Ledger, error) {
	f, table, err := openTable(name)
	if err != nil {
		return nil, fmt.Errorf("open audit counts: %w", err)
	}
	l, err := newLedger(log, table, cfg)
	if err != nil {
		l = &Ledger{counts: f}
		return nil, errors.Join(fmt.Errorf("open audit counts %s: %w", name, err), l.leaveCounts())
	}
	l.counts, l.countsName = f, name
	return l, nil
}

// NewMemoryLedger counts in memory, beside a log made by NewMemory.
func NewMemoryLedger(log *Log, cfg LedgerConfig) (*Ledger, error) {
	return newLedger(log, capture.NewWords(tableWords), cfg)
}

func newLedger(log *Log, table *capture.Words, cfg LedgerConfig) (*Ledger, error) {
	l := &Ledger{cfg: cfg.withDefaults(), log: log, table: table, kinds: map[kindKey]*kindSeen{}, said: map[*cell][classes]uint64{}}
	for i := range l.shards {
		l.shards[i].cells = map[cellKey]*cell{}
	}
	return l, l.recover()
}

// countable says which cell a record belongs to. The path of the key is the
// caller's to fill: its template is made in a buffer.
func countable(r *Record) (k cellKey) {
	k = cellKey{src: r.Src, dst: r.Dst, rule: r.Rule, reason: r.Reason, verb: verbOf(r.Verb), port: r.Port}
	switch {
	case r.Kind == KindDecision && r.Dir == "in" && r.Decision == Allow:
		k.what = allowed
	case r.Kind == KindDecision && r.Dir == "in" && r.Decision == Deny:
		k.what = denied
	case (r.Kind == KindDecision || r.Kind == KindName) && r.Decision == Deny:
		// What a workload asks for outside is its own invention.
		k.what, k.dst, k.port, k.verb = turned, "", 0, ""
	case r.Kind == KindTLS && r.Decision == Deny:
		k.what, k.src, k.rule, k.verb = insecure, "", "", ""
	case r.Kind == KindError:
		k.what = failed
	case r.Kind == KindShadow:
		k.what, k.port, k.verb = lost, 0, ""
		if r.Decision == Allow {
			k.what = gained
		}
		if r.Dir == "out" {
			k.dst = "" // as of refusals
		}
	}
	return k
}

// verbOf keeps callers from inventing verbs without end.
func verbOf(v string) string {
	switch v {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "":
		return v
	}
	return "*"
}

// Append keeps or counts one record. It fills its ID, which for a call that is
// only counted is the id of the roll-ups that count it, and its Tally. After
// an error nothing was kept and the caller must refuse what it stands for.
func (l *Ledger) Append(r *Record) error {
	r.Tally = Tally{}
	k := countable(r)
	if k.what == whole {
		return l.keep(r)
	}
	var buf [maxTemplate]byte
	tpl := buf[:0]
	if k.what == allowed || k.what == denied || k.what == failed {
		tpl = appendTemplate(tpl, r.Path)
	}
	sh := l.shard(&k, len(tpl))
	sh.mu.Lock()
	// Written out here so that the bytes become no string on the heap.
	c := sh.cells[cellKey{what: k.what, port: k.port, src: k.src, dst: k.dst, rule: k.rule, reason: k.reason, verb: k.verb, path: string(tpl)}]
	if c == nil || c.fresh || r.Full || !c.key.what.counted() || l.closed.Load() || l.log.blocked.Load() {
		sh.mu.Unlock()
		return l.slow(r, sh, k, string(tpl))
	}
	c.decide()
	if k.what.shadow() {
		c.settle(classNone, r.Trace)
		sh.mu.Unlock()
		return nil
	}
	sh.mu.Unlock()
	r.ID, r.Tally.c = c.id, c
	return nil
}

// shard is where the cell of a key is. The path may not be in the key yet.
func (l *Ledger) shard(k *cellKey, path int) *shard {
	return &l.shards[(len(k.src)*31+path*7+len(k.rule)*3+len(k.verb))%shardCount]
}

// decide counts a call that begins, under the shard's lock.
func (c *cell) decide() {
	if c.load(cFrom) == 0 {
		c.store(cFrom, uint64(time.Now().UnixNano()))
	}
	atomic.AddUint64(&c.w[cDecided], 1)
	c.idle = 0
}

// slow is Append for what is not merely counted.
func (l *Ledger) slow(r *Record, sh *shard, k cellKey, tpl string) error {
	if l.closed.Load() {
		return ErrClosed
	}
	k.path = tpl
	sh, c := l.cell(k, sh)
	switch {
	case c == nil && k.what.shadow():
		return errNoCell // one by one they would be a flood
	case c == nil:
		r.Count = 1 // it stands for itself, no roll-up counts it
		return l.keep(r)
	}
	defer func() {
		sh.mu.Lock()
		c.pins--
		sh.mu.Unlock()
	}()
	full := l.wanted(r, sh, c)
	// A log that cannot be written is tried, too: it may have recovered.
	if full || l.log.blocked.Load() {
		if err := l.log.Append(r); err != nil {
			if !r.Open {
				l.unclaim(sh, c, full)
				return err
			}
			if full {
				atomic.AddUint64(&l.table.W[hLost], 1)
			}
		}
	}
	r.ID = cmp.Or(r.ID, c.id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	c.decide()
	switch k.what {
	case allowed:
		r.Tally.c = c
	case denied, turned:
		c.settle(class4xx, r.Trace)
	case insecure:
		c.settle(classNone, r.Trace)
	case gained, lost:
		c.settle(classNone, r.Trace)
	case failed:
		c.settle(classByName(r.Class), r.Trace)
	}
	return nil
}

func classByName(name string) int {
	for i, n := range classNames {
		if n == name {
			return i
		}
	}
	return classNone
}

// keep writes the record, or counts that it could not be if the call may go on.
func (l *Ledger) keep(r *Record) error {
	err := l.log.Append(r)
	if err == nil || !r.Open || l.closed.Load() {
		return err
	}
	atomic.AddUint64(&l.table.W[hLost], 1)
	r.ID = cmp.Or(r.ID, l.log.nonce+"lost")
	return nil
}

// wanted says if a record is kept in full, and takes from the budget.
func (l *Ledger) wanted(r *Record, sh *shard, c *cell) bool {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if c.key.what.counted() {
		return l.claim(c) || r.Full
	}
	if c.budget > 0 {
		c.budget--
		return true
	}
	if c.skipped++; c.skipped >= l.cfg.Sample {
		c.skipped = 0
		return true
	}
	return r.Full
}

// due says if the next event of a kind is the first in a day, under mu.
func (l *Ledger) due(k cellKey) bool {
	return k.what.counted() && time.Since(l.seen(k).full) >= fullEvery
}

// claim says if the event of a fresh cell is to be the one of its kind that is
// kept, under the shard's lock. Of another path one may have been since.
func (l *Ledger) claim(c *cell) bool {
	if !c.fresh {
		return false
	}
	c.fresh = false
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.due(c.key) {
		return false
	}
	l.seen(c.key).full = time.Now()
	return true
}

// unclaim asks for the next event of the kind, since this one was not kept.
func (l *Ledger) unclaim(sh *shard, c *cell, full bool) {
	if !full || !c.key.what.counted() {
		return
	}
	sh.mu.Lock()
	defer sh.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	c.fresh = true
	l.seen(c.key).full = time.Time{}
}

// cell finds or makes the cell of a key and pins it; it has another key when
// there are too many paths. None is returned when none is free.
func (l *Ledger) cell(k cellKey, sh *shard) (*shard, *cell) {
	for range 2 {
		sh.mu.Lock()
		c := sh.cells[k]
		if c == nil && l.mayAdd(k) {
			c = l.make(k)
			if c != nil {
				sh.cells[c.key] = c
			}
		}
		if c != nil {
			c.pins++
			sh.mu.Unlock()
			return sh, c
		}
		sh.mu.Unlock()
		if k.path == "**" || k.path == "" {
			break
		}
		k.path = "**"
		sh = l.shard(&k, len(k.path))
	}
	return nil, nil
}

// mayAdd says if one more path template may be counted for itself. It counts
// it.
func (l *Ledger) mayAdd(k cellKey) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := l.seen(k)
	if k.path == "**" || k.path == "" {
		return true
	}
	if seen.templates >= maxTemplates {
		return false
	}
	seen.templates++
	return true
}

// seen is what is known of a caller, destination and rule, under mu.
func (l *Ledger) seen(k cellKey) *kindSeen {
	s := l.kinds[k.kind()]
	if s == nil {
		if len(l.kinds) >= maxKinds {
			clear(l.kinds) // who comes again is seen in full again
		}
		c := k.clone()
		s = new(kindSeen)
		l.kinds[c.kind()] = s
	}
	return s
}

// make takes a free cell for a key, under the shard's lock.
func (l *Ledger) make(k cellKey) *cell {
	text := k.appendTo(nil)
	if len(text) > textSize {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.free) == 0 {
		if !l.short {
			l.short = true
			l.log.cfg.Log.Warn("too many kinds of calls to count each; more are recorded one by one", "cells", maxCells)
		}
		return nil
	}
	index := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	c := l.at(index)
	c.key, c.budget = k.clone(), l.cfg.Budget
	for i := range c.w {
		c.store(i, 0)
	}
	copy(c.text[cText*8:], text)
	c.fresh = l.due(k)
	gen := atomic.AddUint64(&l.table.W[hGen], 1)
	c.id = cellID(l.log.nonce, index, gen)
	c.store(cGen, gen)
	return c
}

// at is the cell with an index, without its key.
func (l *Ledger) at(index int) *cell {
	from := headWords + index*cellWords
	c := &cell{index: index, w: l.table.W[from : from+cellWords : from+cellWords]}
	c.text = l.table.B[from*8 : (from+cellWords)*8 : (from+cellWords)*8]
	return c
}

// Tree opens the tree over the records.
func (l *Ledger) Tree() (*Tree, error) { return OpenTree(l.log) }

// Run brings records to the disk in groups, and the counts every second, and
// tells what was counted every Window, until ctx ends and once more then.
func (l *Ledger) Run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- l.log.Run(ctx) }()
	l.runCounts(ctx)
	return cmp.Or(<-done, l.Flush(context.WithoutCancel(ctx)))
}

func (l *Ledger) runCounts(ctx context.Context) {
	tick := time.NewTicker(min(time.Second, l.cfg.Window))
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := l.table.Sync(); err != nil {
			l.log.cfg.Log.Error("audit counts cannot be brought to the disk", "err", err)
		}
		if time.Since(last) < l.cfg.Window {
			continue
		}
		last = time.Now()
		if err := l.Flush(ctx); err != nil && ctx.Err() == nil {
			l.log.cfg.Log.Warn("audit counts not told; they are kept and told later", "err", err)
		}
	}
}

// Head is the number of the newest record.
func (l *Ledger) Head() uint64 {
	seq, _ := l.log.Head()
	return seq
}

// Durable is the number of the newest record that is on the disk.
func (l *Ledger) Durable() uint64 { return l.log.Durable() }
