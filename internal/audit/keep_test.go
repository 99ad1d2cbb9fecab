package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// keptLog is a log in small files that a witness has signed, and a reader that
// has all of it.
type keptLog struct {
	*signedLog
	reader *Reader
	keeper *Keeper
}

// smallKeep leaves about half of what keptLog writes.
var smallKeep = KeepConfig{MaxBytes: 24 << 10}

func newKeptLog(t *testing.T) *keptLog {
	t.Helper()
	dir := t.TempDir()
	k := &keptLog{signedLog: &signedLog{path: filepath.Join(dir, "audit.jsonl"), heads: &memHeads{}, name: LogName(billingID, nodeID)}}
	var err error
	if k.w, err = OpenWitness(t.TempDir(), k.heads); err != nil {
		t.Fatal(err)
	}
	k.open(t)
	return k
}

// open opens what is at the path.
func (k *keptLog) open(t *testing.T) {
	t.Helper()
	var err error
	if k.log, err = Open(Config{Path: k.path, Log: quiet(), MaxFile: 4 << 10}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.log.Close() })
	k.tree = treeAt(t, k.log)
	spool, err := k.log.Spool(SpoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	seq, _ := k.log.Head()
	k.reader = spool.Reader("a sink", seq)
	k.keeper = k.log.Keep(smallKeep, k.tree)
}

// grow writes records, which are signed and delivered.
func (k *keptLog) grow(t *testing.T, n int) {
	t.Helper()
	k.signedLog.grow(t, n)
	k.cosign(t)
	seq, _ := k.log.Head()
	k.reader.Delivered(seq)
}

func (k *keptLog) sweep(t *testing.T) {
	t.Helper()
	if err := k.keeper.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// sizes are the bytes in the files of the log, and how many those are.
func (k *keptLog) sizes(t *testing.T) (all int64, files int) {
	t.Helper()
	names, err := Segments(k.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		all += st.Size()
	}
	return all, len(names)
}

// removals are the records of removals, oldest first.
func removals(t *testing.T, path string) (out []Record) {
	t.Helper()
	if err := Each(path, func(_ []byte, r *Record) error {
		if r.Kind == KindRemoved {
			out = append(out, *r)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func mustPass(t *testing.T, path string, trust Trust) Report {
	t.Helper()
	rep, err := VerifyFile(path, trust)
	if err != nil || say(rep) != "pppp" {
		t.Fatalf("%s %+v %v", say(rep), rep, err)
	}
	return rep
}

func TestKeepBySize(t *testing.T) {
	k := newKeptLog(t)
	var from uint64 = 1
	for round := range 6 {
		k.grow(t, 120)
		k.sweep(t)
		mustUpdate(t, k.log, k.tree)
		k.cosign(t)
		if all, _ := k.sizes(t); all > smallKeep.MaxBytes+8<<10 {
			t.Fatalf("%d bytes are kept", all)
		}
		rep := mustPass(t, k.path, k.trust(t))
		if rep.Kept == nil || rep.Kept.From <= from || rep.Kept.Removed != rep.Kept.From-1 || rep.First != rep.Kept.From {
			t.Fatalf("round %d: %+v after %d", round, rep, from)
		}
		from = rep.Kept.From
		if want := fmt.Sprintf("kept from record %d; %d before it were removed until %s by audit.keep.max_bytes 24576, evidence signed; up to record", from, from-1, rep.Kept.At.Format(time.RFC3339)); !strings.HasPrefix(rep.Completeness.Detail, want) {
			t.Errorf("%q is not %q", rep.Completeness.Detail, want)
		}
		if round%2 == 1 { // a restart, with tiles lost
			k.log.Close()
			if round == 3 {
				if err := os.RemoveAll(filepath.Join(TreeDir(k.path), "tile")); err != nil {
					t.Fatal(err)
				}
			}
			k.open(t)
		}
	}
	last := removals(t, k.path)[0]
	if last.Reason != "max_bytes" || last.Count == 0 || last.From.IsZero() || len(last.Detail) > maxDetail || strings.HasSuffix(last.Detail, "…") {
		t.Errorf("%+v", last)
	}
	id, first, known, err := Begin(k.path)
	if err != nil || first != from || !known {
		t.Errorf("begins %x %d %t %v", id, first, known, err)
	}
	if _, err := Prove(k.path, from-1); err == nil || !strings.Contains(err.Error(), "removed") {
		t.Errorf("proves what is gone: %v", err)
	}
	p, err := Prove(k.path, from)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.Check([]string{k.w.Key()}); err != nil || got.Record.Seq != from {
		t.Errorf("%+v %v", got, err)
	}
	tail, err := OpenTail(k.path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tail.Close()
	if _, seq, err := tail.Next(t.Context()); err != nil || seq != from {
		t.Errorf("from the beginning: %d %v", seq, err)
	}
}

// TestKeepHoldsWhatIsNotDelivered: whatever the rule says, a record stays until
// every reader has it and a witness has signed it.
func TestKeepHoldsWhatIsNotDelivered(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, k *keptLog)
	}{
		{"a second reader is down", func(t *testing.T, k *keptLog) { k.grow(t, 300); k.log.spool.Reader("another", 0) }},
		{"the reader is at the first record", func(t *testing.T, k *keptLog) { k.signedLog.grow(t, 300); k.cosign(t); k.reader.Delivered(1) }},
		{"no witness has signed", func(t *testing.T, k *keptLog) {
			k.signedLog.grow(t, 300)
			seq, _ := k.log.Head()
			k.reader.Delivered(seq)
		}},
		{"nobody reads, and that is not allowed", func(t *testing.T, k *keptLog) { k.grow(t, 300); k.log.spool.readers = nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := newKeptLog(t)
			tt.do(t, k)
			_, before := k.sizes(t)
			k.sweep(t)
			if _, after := k.sizes(t); after != before || len(removals(t, k.path)) > 0 || before < 10 {
				t.Errorf("%d files before, %d after", before, after)
			}
		})
	}
	k := newKeptLog(t)
	k.grow(t, 300)
	k.log.spool.readers = nil
	k.keeper.cfg.WithoutSink = true
	k.sweep(t)
	if all, _ := k.sizes(t); all > smallKeep.MaxBytes+8<<10 {
		t.Errorf("%d bytes are kept though nobody reads and that is allowed", all)
	}
	k = newKeptLog(t)
	k.grow(t, 300)
	k.reader.Delivered(100) // the file with record 100 stays: it may be asked for
	k.sweep(t)
	if names, _ := Segments(k.path); names[0] > segmentName(k.path, 100) || len(removals(t, k.path)) == 0 {
		t.Errorf("record 100 is not in %s", names[0])
	}
}

// written gives the files of a log the time of the bubble, in which the disk is
// not.
func written(t *testing.T, path string) {
	t.Helper()
	names, err := Segments(path)
	for _, name := range names {
		if st, e := os.Stat(name); e == nil && st.ModTime().After(time.Now()) {
			err = errors.Join(err, os.Chtimes(name, time.Now(), time.Now()))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestKeepByAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeptLog(t)
		k.keeper.cfg = KeepConfig{Age: 24 * time.Hour}
		for range 40 { // two records an hour, so that no file is ever full
			for range 2 {
				k.grow(t, 1)
				written(t, k.path)
				k.sweep(t)
				time.Sleep(30 * time.Minute)
			}
		}
		mustUpdate(t, k.log, k.tree)
		k.cosign(t)
		rep := mustPass(t, k.path, k.trust(t))
		oldest := time.Time{}
		if err := Each(k.path, func(_ []byte, r *Record) error { oldest = r.Time; return ErrStop }); err != nil {
			t.Fatal(err)
		}
		if age := time.Since(oldest); age < 24*time.Hour || age > 28*time.Hour+time.Hour/2 || rep.Kept == nil || rep.Kept.Rule != "audit.keep.age 24h0m0s" {
			t.Errorf("the oldest record has %v, %+v", age, rep.Kept)
		}
	})
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// crashed copies a log with all that is beside it, as a crash would leave it.
func crashed(t *testing.T, path string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Dir(path))); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"*", "*/*"} { // CopyFS gives others the right to read
		names, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, name := range names {
			if st, err := os.Stat(name); err != nil {
				t.Fatal(err)
			} else if st.Mode().IsRegular() {
				if err := os.Chmod(name, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return filepath.Join(dir, filepath.Base(path))
}

// TestKeepSurvivesACrashBetweenSteps stops a removal after each of its steps.
// Each time nothing is wrong with what is left, all that is gone has evidence,
// and a restart ends the removal with one record.
func TestKeepSurvivesACrashBetweenSteps(t *testing.T) {
	k := newKeptLog(t)
	k.grow(t, 60)
	k.sweep(t) // so that there is evidence already
	k.grow(t, 100)
	files, rule, err := k.keeper.plan()
	if err != nil || len(files) < 2 {
		t.Fatal(files, err)
	}
	s, err := k.keeper.describe(files, rule)
	if err != nil {
		t.Fatal(err)
	}
	before := len(removals(t, k.path))
	steps := k.keeper.steps(t.Context(), s)
	for done := 0; ; done++ {
		heads := &memHeads{m: maps.Clone(k.heads.m), at: maps.Clone(k.heads.at)}
		c := &keptLog{signedLog: &signedLog{path: crashed(t, k.path), heads: heads, name: k.name, w: &Witness{key: k.w.key, heads: heads}}}
		rep, err := VerifyFile(c.path, k.trust(t))
		if err != nil || !rep.Completeness.OK || !rep.Integrity.OK {
			t.Fatalf("after %d steps: %+v %v", done, rep, err)
		}
		if was := rep.Kept.From; done >= 3 && was != s.Last+1 || done < 3 && was != s.First {
			t.Errorf("after %d steps it is kept from %d", done, was)
		}
		c.open(t)
		c.have = c.tree.Witnessed()
		c.keeper.cfg = KeepConfig{} // even when nothing is to be removed any more
		c.sweep(t)
		if done < 2 { // there was no evidence: all of it is still there
			c.keeper.cfg = smallKeep
			c.sweep(t)
		}
		told := removals(t, c.path)
		for i, r := range told[1:] {
			if r.Total-r.Count != told[i].Total {
				t.Errorf("after %d steps: %s, and then %s", done, told[i].Detail, r.Detail)
			}
		}
		last := told[len(told)-1].Total
		if done >= 2 && (len(told) != before+1 || last != s.Last) {
			t.Errorf("after %d steps there are %d records of removals, the last of %d", done, len(told), last)
		}
		names, err := Segments(c.path)
		if err != nil || names[0] != segmentName(c.path, last+1) {
			t.Errorf("after %d steps: %v %v", done, names, err)
		}
		c.grow(t, 5)
		if rep := mustPass(t, c.path, c.trust(t)); rep.Kept.From != last+1 {
			t.Errorf("after %d steps: %+v", done, rep.Kept)
		}
		if done == len(steps) {
			break
		}
		if err := steps[done](); err != nil {
			t.Fatal(err)
		}
		seq, _ := k.log.Head()
		k.reader.Delivered(seq)
	}
}

// TestWhatAnAttackerCanDoToAKeptLog is TestWhatAnAttackerCanDoToALog for what
// speaks of records that are gone.
func TestWhatAnAttackerCanDoToAKeptLog(t *testing.T) {
	oldest := func(t *testing.T, k *keptLog) string {
		t.Helper()
		names, err := Segments(k.path)
		if err != nil {
			t.Fatal(err)
		}
		return names[0]
	}
	edit := func(t *testing.T, k *keptLog, f func(r *removal)) {
		t.Helper()
		s, err := kept(k.path)
		if err != nil {
			t.Fatal(err)
		}
		f(s.removal)
		text, err := s.text()
		if err != nil {
			t.Fatal(err)
		}
		signed, err := note.Sign(&note.Note{Text: text}, k.tree.key)
		if err == nil {
			err = os.WriteFile(k.path+keptSuffix, signed, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	rewrite := func(t *testing.T, k *keptLog) {
		// Another log of the same key, longer than what a witness has signed, of
		// which everything up to its last file is said to be removed by rule.
		liar := &keptLog{signedLog: &signedLog{path: k.path, heads: &memHeads{}, name: k.name}}
		var err error
		if liar.w, err = OpenWitness(t.TempDir(), liar.heads); err != nil {
			t.Fatal(err)
		}
		k.log.Close()
		for _, name := range append(mustGlob(t, k.path+"*"), filepath.Join(TreeDir(k.path), cosignedFile)) {
			if info, err := os.Stat(name); err == nil && !info.IsDir() {
				_ = os.Remove(name)
			}
		}
		key := mustRead(t, filepath.Join(TreeDir(k.path), keyFile))
		_ = os.RemoveAll(TreeDir(k.path))
		_ = os.MkdirAll(TreeDir(k.path), 0o700)
		_ = os.WriteFile(filepath.Join(TreeDir(k.path), keyFile), key, 0o600)
		liar.open(t)
		for range 6 {
			liar.grow(t, 90)
			liar.sweep(t)
		}
		_ = os.Remove(filepath.Join(TreeDir(k.path), cosignedFile))
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, k *keptLog)
		want string
	}{
		{"nothing", func(*testing.T, *keptLog) {}, "pppp"},
		{"removes another file", func(t *testing.T, k *keptLog) { _ = os.Remove(oldest(t, k)) }, "pfpp"},
		{"removes the evidence", func(t *testing.T, k *keptLog) { _ = os.Remove(k.path + keptSuffix) }, "pfpp"},
		{"changes the evidence", func(t *testing.T, k *keptLog) {
			b := bytes.Replace(mustRead(t, k.path+keptSuffix), []byte(`"rule":"audit.keep.max_bytes 24576"`), []byte(`"rule":"audit.keep.max_bytes 24577"`), 1)
			_ = os.WriteFile(k.path+keptSuffix, b, 0o600)
		}, "pfpp"},
		{"has the key, and another rule", func(t *testing.T, k *keptLog) { edit(t, k, func(r *removal) { r.Rule = "audit.keep.age 1h" }) }, "pfpp"},
		{"has the key, and another hash of the last record", func(t *testing.T, k *keptLog) { edit(t, k, func(r *removal) { r.Prev[0] ^= 1 }) }, "ffpp"},
		{"has the key, and another tree", func(t *testing.T, k *keptLog) {
			edit(t, k, func(r *removal) {
				e := r.edge()
				e.levels[0][0][0] ^= 1
				r.setEdge(e)
			})
		}, "ffpp"},
		{"has the key, and writes evidence of more than was signed", rewrite, "pfuu"},
		{"has the key, writes evidence of more than was signed, and removes the tree", func(t *testing.T, k *keptLog) {
			rewrite(t, k)
			_ = os.RemoveAll(TreeDir(k.path))
		}, "pfuu"},
		{"changes a record of a file that is kept", func(t *testing.T, k *keptLog) {
			name := oldest(t, k)
			_ = os.WriteFile(name, bytes.Replace(mustRead(t, name), []byte(`"port":8443`), []byte(`"port":8444`), 1), 0o600)
		}, "fppp"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := newKeptLog(t)
			for range 4 { // so that the tree up to the last has hashes at its lowest level
				k.grow(t, 77)
				k.sweep(t)
			}
			k.grow(t, 1)
			tt.do(t, k)
			rep, err := VerifyFile(k.path, k.trust(t))
			if err != nil && !errors.Is(err, ErrBroken) {
				t.Fatal(err)
			}
			if say(rep) != tt.want {
				t.Errorf("%s, want %s: %+v", say(rep), tt.want, rep)
			}
		})
	}
}

// TestRecordsOfTheFutureGrowOld: a proxy that dates its records ahead does not
// have its copy kept for good.
func TestRecordsOfTheFutureGrowOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := openAt(t, filepath.Join(t.TempDir(), "audit.log"))
		for range 20 {
			r := sample()
			r.Time = time.Now().Add(10 * 365 * 24 * time.Hour)
			if err := l.Append(&r); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(t.TempDir(), CopyName(billingID, nodeID))
		m := mirrorAt(t, path)
		var lines [][]byte
		for b := range bytes.Lines(mustRead(t, l.cfg.Path)) {
			lines = append(lines, b)
		}
		mustReceive(t, m, lines, 20)
		into := openAt(t, filepath.Join(t.TempDir(), "audit.jsonl"))
		w, err := OpenWitness(t.TempDir(), &memHeads{})
		if err != nil {
			t.Fatal(err)
		}
		written(t, path)
		for _, tt := range []struct {
			after time.Duration
			gone  bool
		}{{30 * time.Minute, false}, {time.Hour, true}} {
			time.Sleep(tt.after)
			if err := m.Sweep(t.Context(), KeepConfig{Age: time.Hour, WithoutSink: true}, w, nil, into); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(path + keptSuffix); (err == nil) != tt.gone {
				t.Errorf("after %v: %v", tt.after, err)
			}
		}
	})
}

// TestKeepLeavesWhatWasChanged: a file that is not what was signed is evidence
// of something else, and stays.
func TestKeepLeavesWhatWasChanged(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, k *keptLog, oldest string)
		want string
	}{
		{"a record changed", func(t *testing.T, _ *keptLog, oldest string) {
			_ = os.WriteFile(oldest, bytes.Replace(mustRead(t, oldest), []byte(`"port":8443`), []byte(`"port":8444`), 1), 0o600)
		}, "does not continue record 1"},
		{"its end cut off", func(t *testing.T, _ *keptLog, oldest string) {
			_ = os.WriteFile(oldest, cutLines(mustRead(t, oldest), 3), 0o600)
		}, "ends with record 6"},
		{"the chain written anew", func(t *testing.T, k *keptLog, oldest string) {
			var prev hash
			var out []byte
			for b := range bytes.Lines(mustRead(t, oldest)) {
				r, _, err := ParseLine(b)
				if err != nil {
					t.Fatal(err)
				}
				r.Port = 1
				line := appendRecord(nil, &r, &prev)
				prev, out = sha256.Sum256(line), append(out, line...)
			}
			_ = os.WriteFile(oldest, out, 0o600)
		}, "not what the checkpoint speaks of"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := newKeptLog(t)
			k.keeper.cfg.MaxBytes = 44 << 10 // one file goes
			k.grow(t, 100)
			names, err := Segments(k.path)
			if err != nil {
				t.Fatal(err)
			}
			tt.do(t, k, names[0])
			_, before := k.sizes(t)
			if err := k.keeper.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if _, after := k.sizes(t); after != before || len(mustGlob(t, k.path+keptSuffix+"*")) > 0 {
				t.Errorf("%d files before, %d after", before, after)
			}
		})
	}
}

// TestMirrorSweep keeps a copy by a rule: the witness signs for it, the keeper's
// own log has the record, and the copy goes on to grow, to be verified and to
// prove.
func TestMirrorSweep(t *testing.T) {
	s := newSignedLog(t)
	s.grow(t, 450)
	s.cosign(t)
	heads := s.trust(t).Heads
	s.grow(t, 250)
	s.cosign(t)
	// The newest is ahead of the copy at first.
	heads = append(heads, s.trust(t).Heads...)
	var lines [][]byte
	for b := range bytes.Lines(mustRead(t, s.path)) {
		lines = append(lines, b)
	}
	path := filepath.Join(t.TempDir(), CopyName(billingID, nodeID))
	open := func() *Mirror {
		m, err := OpenMirror(Config{Path: path, Log: quiet(), MaxFile: 4 << 10})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	into := openAt(t, filepath.Join(t.TempDir(), "audit.jsonl"))
	sweep := func(m *Mirror, cfg KeepConfig) {
		t.Helper()
		if err := m.Sweep(t.Context(), cfg, s.w, heads, into); err != nil {
			t.Fatal(err)
		}
	}
	m := open()
	mustReceive(t, m, lines[:500], 500)
	sweep(m, KeepConfig{MaxBytes: 64 << 10})
	if rep, err := VerifyFile(path, Trust{}); err != nil || rep.Kept != nil {
		t.Fatalf("without leave: %+v %v", rep, err)
	}
	cfg := KeepConfig{MaxBytes: 64 << 10, WithoutSink: true}
	sweep(m, cfg)
	m.Close()
	m = open()
	mustReceive(t, m, lines[400:], 700)
	sweep(m, cfg)
	rep := mustPass(t, path, s.trust(t))
	if rep.Kept == nil || rep.First != rep.Kept.From || rep.Last != 700 || rep.Kept.From < 400 {
		t.Fatalf("%+v %+v", rep, rep.Kept)
	}
	if rep, err := VerifyFile(path, Trust{}); err != nil || say(rep) != "puuu" || !strings.Contains(rep.Completeness.Detail, "no witness whose key was given has signed the evidence") {
		t.Errorf("%s %+v %v", say(rep), rep, err)
	}
	for seq := rep.Kept.From; seq <= 700; seq += 1 + rand.Uint64N(20) {
		p, err := ProveCopy(path, seq, s.trust(t).Heads)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := p.Check([]string{s.w.Key()}); err != nil || got.Record.Seq != seq {
			t.Fatalf("record %d: %+v %v", seq, got, err)
		}
	}
	if _, err := ProveCopy(path, 3, s.trust(t).Heads); err == nil || !strings.Contains(err.Error(), "removed") {
		t.Errorf("proves what is gone: %v", err)
	}
	if told := removals(t, into.cfg.Path); len(told) < 2 || told[0].Count == 0 || !strings.Contains(told[0].Detail, filepath.Base(path)) || len(told[0].Detail) >= maxDetail {
		t.Errorf("%+v", told)
	}
	// The same log again is no new one; another is, and what is kept of the one
	// before goes with its evidence.
	mustReceive(t, m, lines[:10], 700)
	mustReceive(t, m, linesOf(t, 7), 7)
	mustPass(t, path+".old-1", s.trust(t))
}

// TestACopyThatWasNotCosignedIsKept: a proxy that sends another log than the one
// it has signed does not get rid of what it sent.
func TestACopyThatWasNotCosignedIsKept(t *testing.T) {
	s := newSignedLog(t)
	s.grow(t, 300)
	s.cosign(t)
	cfg := KeepConfig{MaxBytes: 16 << 10, WithoutSink: true}
	into := openAt(t, filepath.Join(t.TempDir(), "audit.jsonl"))
	for _, tt := range []struct {
		name  string
		heads []Head
		ended bool
		want  string // of the error
		gone  bool
	}{
		{"heads of another log", s.trust(t).Heads, false, "not the log that was cosigned", false},
		{"heads of another log, and this one ended", s.trust(t).Heads, true, "", false},
		{"no heads", nil, false, "", true},
	} {
		path := filepath.Join(t.TempDir(), CopyName(billingID, nodeID))
		if tt.ended {
			path += endedMark + "1"
		}
		m, err := OpenMirror(Config{Path: path, Log: quiet(), MaxFile: 4 << 10})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		mustReceive(t, m, linesOf(t, 400), 400)
		err = m.Sweep(t.Context(), cfg, s.w, tt.heads, into)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if _, err := os.Stat(path + keptSuffix); (err == nil) != tt.gone {
			t.Errorf("%s: removed is %v", tt.name, err == nil)
		}
	}
}

// TestMirrorSweptEmpty removes all that a proxy which is gone has sent.
func TestMirrorSweptEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSignedLog(t)
		s.grow(t, 50)
		s.cosign(t)
		var lines [][]byte
		for b := range bytes.Lines(mustRead(t, s.path)) {
			lines = append(lines, b)
		}
		path := filepath.Join(t.TempDir(), CopyName(billingID, nodeID))
		m := mirrorAt(t, path)
		mustReceive(t, m, lines[:40], 40)
		into := openAt(t, filepath.Join(t.TempDir(), "audit.jsonl"))
		written(t, path)
		time.Sleep(2 * time.Hour)
		sweep := func() {
			t.Helper()
			if err := m.Sweep(t.Context(), KeepConfig{Age: time.Hour, WithoutSink: true}, s.w, s.trust(t).Heads, into); err != nil {
				t.Fatal(err)
			}
		}
		sweep() // puts the file aside, and reads in it that it is old
		if _, err := os.Stat(path + keptSuffix); err != nil {
			t.Fatal(err)
		}
		m.Close()
		trust := s.trust(t)
		trust.Workload = billingID
		if rep, err := VerifyFile(path, trust); !errors.Is(err, ErrBroken) || rep.Last != 40 || !strings.Contains(rep.Completeness.Detail, "its end was cut off") {
			t.Errorf("%+v %v", rep, err)
		}
		if last, err := LastSeq(path); err != nil || last != 40 {
			t.Errorf("newest record %d %v", last, err)
		}
		m = mirrorAt(t, path)
		mustReceive(t, m, lines[40:], 50)
		if rep := mustPass(t, path, s.trust(t)); rep.First != 41 || rep.Kept.Removed != 40 {
			t.Errorf("%+v", rep)
		}
	})
}

func TestSpineAgreesWithEdge(t *testing.T) {
	var e edge
	var s spine
	for n := range 70_000 {
		if n < 600 || n%997 == 0 || n > 65_500 && n < 65_600 {
			half := e.spine()
			if s.root() != e.root() || half.root() != e.root() || half.size != e.size {
				t.Fatalf("%d leaves", n)
			}
		}
		leaf := tlog.RecordHash([]byte{byte(n), byte(n >> 8)})
		s.add(leaf)
		_ = e.add(leaf, keepNothing)
	}
}

func FuzzRemoval(f *testing.F) {
	var e edge
	for n := range 300 {
		_ = e.add(tlog.RecordHash([]byte{byte(n)}), keepNothing)
	}
	r := &removal{First: 1, Last: 300, Rule: "audit.keep.age 1h", Files: []goneFile{{Name: "x"}}}
	r.setEdge(e)
	text, err := r.text()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(text + "\n"))
	f.Add([]byte(removalHead + "{}\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRemoval(b)
		if err != nil {
			return
		}
		if e := r.edge(); sum(e.root()) != r.Root || e.size != r.Last {
			t.Errorf("%q", b)
		}
		s := signedRemoval{removal: r}
		if rec, err := s.record("x"); err != nil || rec.Count == 0 {
			t.Errorf("%q: %+v %v", b, rec, err)
		}
	})
}

func TestKeepConfig(t *testing.T) {
	for _, tt := range []struct {
		c    KeepConfig
		want string
		file int64
	}{
		{KeepConfig{}, "", 0},
		{KeepConfig{Age: time.Hour}, "", 0},
		{KeepConfig{MaxBytes: 1 << 20, WithoutSink: true}, "", 128 << 10},
		{KeepConfig{MaxBytes: 1 << 40}, "", 256 << 20},
		{KeepConfig{Age: time.Minute, MaxBytes: 5}, "age: 1m0s is too short; write at least 1h0m0s, or leave it out to keep records for good\nmax_bytes: 5 is too small; write at least 1048576, or leave it out to set no bound", 0},
		{KeepConfig{Age: -1}, "age: -1ns is too short; write at least 1h0m0s, or leave it out to keep records for good", 0},
		{KeepConfig{WithoutSink: true}, "without_sink: it says nothing without age or max_bytes", 0},
	} {
		got := ""
		if err := tt.c.Validate(); err != nil {
			got = err.Error()
		} else if n := tt.c.MaxFile(); n != tt.file {
			t.Errorf("%+v has files of %d bytes, want %d", tt.c, n, tt.file)
		}
		if got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.c, got, tt.want)
		}
	}
}

// TestVerifyWhileRecordsAreRemoved verifies a log that is written, put aside and
// removed from meanwhile: it is whole at every moment.
func TestVerifyWhileRecordsAreRemoved(t *testing.T) {
	k := newKeptLog(t)
	trust := k.trust(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			k.grow(t, 20)
			k.sweep(t)
		}
	}()
	for n := 0; n < 40; {
		rep, err := VerifyFile(k.path, trust)
		if err != nil && strings.Contains(err.Error(), "change too fast") {
			continue
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // the first record is not written yet
		}
		if err != nil {
			t.Errorf("%+v %v", rep, err)
			break
		}
		if n++; rep.Kept == nil {
			n = 0
		}
	}
	stop()
	<-ended
}
