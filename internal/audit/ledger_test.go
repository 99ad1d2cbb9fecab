package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/capture"
)

func memoryLedger(t testing.TB, cfg LedgerConfig) (*Ledger, *Log) {
	t.Helper()
	log := NewMemory()
	l, err := NewMemoryLedger(log, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l, log
}

func ledgerAt(t testing.TB, path string) *Ledger {
	t.Helper()
	l, err := OpenLedger(Config{Path: path, Log: quiet()}, LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// counted sums what roll-ups and the records that stand for themselves say, by
// decision and class, and counts the decisions kept in full.
func counted(records []Record) (sums map[string]uint64, full map[string]int) {
	sums, full = map[string]uint64{}, map[string]int{}
	for _, r := range records {
		switch {
		case r.Kind == KindRollup && r.Detail == "":
			sums[r.Decision+" "+r.Class] += r.Count
			sums[""] += r.Count
		case r.Kind == KindDecision:
			full[r.Decision]++
			sums[""] += r.Count
		}
	}
	return sums, full
}

func readRecords(t testing.TB, path string) (out []Record) {
	t.Helper()
	names, err := Segments(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(b) {
			r, _, err := ParseLine(line)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			out = append(out, r)
		}
	}
	return out
}

func TestLedgerCountsExactly(t *testing.T) {
	l, log := memoryLedger(t, LedgerConfig{Budget: 5, Sample: 50})
	const workers, each = 8, 2000
	var wg, told sync.WaitGroup
	stop := make(chan struct{})
	told.Go(func() { // roll-ups are written all the while
		for {
			select {
			case <-stop:
				return
			default:
				if err := l.Flush(t.Context()); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				r := sample()
				r.Path = fmt.Sprintf("/v1/charges/%d/lines", i)
				if i%10 == 0 {
					r.Decision, r.Reason, r.Rule = Deny, "no_rule", ""
				}
				if err := l.Append(&r); err != nil || r.ID == "" {
					t.Error(err, r.ID)
				}
				status := 200
				if (i+w)%7 == 0 {
					status = 503
				}
				r.Tally.Done(status, r.Trace)
			}
		})
	}
	wg.Wait()
	close(stop)
	told.Wait()
	if err := l.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	sums, full := counted(log.Records())
	if sums[""] != workers*each || sums["deny 4xx"] != workers*each/10 || sums["allow 2xx"]+sums["allow 5xx"] != workers*each*9/10 {
		t.Errorf("sums are %v, want %d in all and %d refusals", sums, workers*each, workers*each/10)
	}
	if full[Allow] < 1 || full[Allow] > workers {
		t.Errorf("%d calls that were allowed are in full, want the first", full[Allow])
	}
	if n := full[Deny]; n < 5 || n >= workers*each/10 {
		t.Errorf("%d of %d refusals are in full, want samples", n, workers*each/10)
	}
	traced := false // a roll-up has no trace that is noted just then
	for _, r := range log.Records() {
		if r.Kind == KindRollup && (r.Path != "/v1/charges/{}/lines" || r.Trace != "" && len(r.Trace) != 32 || r.From.IsZero() || r.ID == "") {
			t.Fatalf("roll-up %+v lacks path template, whole trace or start", r)
		}
		traced = traced || r.Kind == KindRollup && r.Trace != ""
	}
	if !traced {
		t.Error("no roll-up has a trace")
	}
}

func TestLedgerKeepsInFull(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Record)
		full   bool
	}{
		{"the next call of the kind is counted", func(*Record) {}, false},
		{"another path of the rule is counted", func(r *Record) { r.Path = "/v1/other" }, false},
		{"another caller is new", func(r *Record) { r.Src += "-2" }, true},
		{"another rule is new", func(r *Record) { r.Rule = "x" }, true},
		{"a route that asks for it", func(r *Record) { r.Full = true }, true},
		{"a refusal", func(r *Record) { r.Decision = Deny }, true},
		{"a call out of the mesh", func(r *Record) { r.Dir = "out" }, true},
		{"a failed handshake", func(r *Record) { r.Kind, r.Decision = KindTLS, Deny }, true},
		{"a failed call", func(r *Record) { r.Kind, r.Decision = KindError, "" }, true},
		{"an attestation", func(r *Record) { r.Kind = KindAttest }, true},
		{"names too long for a cell", func(r *Record) { r.Dst = "spiffe://d/" + strings.Repeat("x", 900) }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, log := memoryLedger(t, LedgerConfig{})
			first, second := sample(), sample()
			if err := l.Append(&first); err != nil {
				t.Fatal(err)
			}
			before := len(log.Records())
			if before != 1 {
				t.Fatalf("the first call of all left %d records", before)
			}
			tt.change(&second)
			if err := l.Append(&second); err != nil || second.ID == "" {
				t.Fatal(err, second.ID)
			}
			if got := len(log.Records()) > before; got != tt.full {
				t.Errorf("in full: %v, want %v", got, tt.full)
			}
		})
	}
}

// Of differences the first of a kind is kept, the others are counted, and none
// is taken for a call.
func TestLedgerCountsDifferences(t *testing.T) {
	l, log := memoryLedger(t, LedgerConfig{})
	difference := func(decision, src, path string) {
		r := Record{Kind: KindShadow, Decision: decision, Reason: "why", Rule: "row", Dir: "in", Src: src, Dst: "spiffe://d/b", Port: 1, Verb: "GET", Path: path, ID: "told-1", Open: true}
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
	}
	call := sample()
	call.Src, call.Dst, call.Rule = "spiffe://d/a", "spiffe://d/b", "row"
	if err := l.Append(&call); err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		difference(Allow, "spiffe://d/a", fmt.Sprintf("/made/up/%d", i))
		difference(Deny, "spiffe://d/a", "/x")
		difference(Deny, "spiffe://d/c", "/x")
	}
	if err := l.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	full, sums := 0, map[string]uint64{}
	for _, r := range log.Records() {
		switch {
		case r.Kind == KindShadow && r.ID == "told-1":
			full++
		case r.Kind == KindRollup && r.Detail == "candidate":
			sums[r.Decision+" "+r.Src] += r.Count
		}
	}
	if full != 3 || len(sums) != 3 || sums["allow spiffe://d/a"] != 5000 || sums["deny spiffe://d/a"] != 5000 || sums["deny spiffe://d/c"] != 5000 {
		t.Errorf("%d in full, want 3; counted %v, want 5000 each", full, sums)
	}
	if calls, _ := counted(log.Records()); calls[""] != 0 && calls[""] != 1 {
		t.Errorf("differences were counted as calls: %v", calls)
	}
}

func TestLedgerBoundsWhatCallersInvent(t *testing.T) {
	l, log := memoryLedger(t, LedgerConfig{Budget: 1, Sample: 1 << 30})
	const n = 3000
	for i := range n {
		r := sample()
		r.Path, r.Verb = "/"+strings.Repeat("a", 1+i%30)+"/"+string(rune('a'+i%26))+strings.Repeat("b", i/100), fmt.Sprint("VERB", i)
		if i%2 == 0 {
			r.Decision, r.Rule = Deny, ""
		}
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
		r.Tally.Done(200, "")
	}
	if err := l.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	sums, _ := counted(log.Records())
	if sums[""] != n {
		t.Errorf("counted %d of %d", sums[""], n)
	}
	if used := maxCells - len(l.free); used > 2*(maxTemplates+1) {
		t.Errorf("one caller holds %d cells", used)
	}
}

func TestLedgerFreesIdleCells(t *testing.T) {
	l, _ := memoryLedger(t, LedgerConfig{})
	r := sample()
	if err := l.Append(&r); err != nil {
		t.Fatal(err)
	}
	for range 2 * idleWindows {
		if err := l.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.free) != maxCells-1 {
		t.Error("a cell with a running call was freed")
	}
	r.Tally.Done(200, "")
	for range idleWindows + 1 {
		if err := l.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.free) != maxCells {
		t.Errorf("%d cells are held by nobody", maxCells-len(l.free))
	}
}

func TestLedgerWhenTheLogIsBroken(t *testing.T) {
	disk := &failing{}
	log := withDisk(disk)
	l, err := NewMemoryLedger(log, LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	r := sample()
	if err := l.Append(&r); err != nil { // its cell is made
		t.Fatal(err)
	}
	r.Tally.Done(200, "")
	disk.write = errors.New("disk full")
	broken := sample()
	broken.Kind = KindAdmin
	if err := l.Append(&broken); err == nil {
		t.Fatal("kept on a full disk")
	}
	closed := sample()
	if err := l.Append(&closed); err == nil {
		t.Error("a call went on that could not be recorded, and its route does not say so")
	}
	open := sample()
	open.Open = true
	if err := l.Append(&open); err != nil || open.ID == "" {
		t.Errorf("a call of a route that fails open: %v", err)
	}
	open.Tally.Done(200, "")
	full := sample()
	full.Open, full.Full = true, true
	if err := l.Append(&full); err != nil {
		t.Errorf("a call of a route that fails open, wanted in full: %v", err)
	}
	full.Tally.Done(200, "")
	if err := l.Flush(t.Context()); err == nil {
		t.Error("told on a full disk")
	}
	disk.write = nil
	if err := l.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := sample()
	if err := l.Append(&after); err != nil {
		t.Errorf("after the disk has space again: %v", err)
	}
	gaps := map[string]uint64{}
	var sum uint64
	for b := range bytes.Lines(disk.buf.Bytes()) {
		rec, _, err := ParseLine(b)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Kind == KindGap {
			gaps[rec.Reason] += rec.Count
		}
		if rec.Kind == KindRollup {
			sum += rec.Count
		}
	}
	if sum != 3 || gaps["lost"] != 1 || gaps["refused"] < 2 {
		t.Errorf("counted %d calls, want 3; gaps %v, want 1 lost and those refused", sum, gaps)
	}
}

// TestChildCounts is the process that TestLedgerSurvivesKill kills. It notes
// in a mapped file what it begins and what was acknowledged.
func TestChildCounts(t *testing.T) {
	path := os.Getenv("SALLYPORT_LEDGER_CHILD")
	if path == "" {
		return
	}
	acks := mapAcks(t, path+".acks")
	l, err := OpenLedger(Config{Path: path, Log: quiet()}, LedgerConfig{Window: 2 * time.Millisecond, Budget: 3, Sample: 10})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go l.Run(context.Background())
	for w := range ackWorkers {
		go func() {
			for i := uint64(0); ; i++ {
				r := sample()
				r.Path = fmt.Sprintf("/v1/w%d/%d", w, i)
				if i%10 == 0 {
					r.Decision, r.Reason, r.Rule = Deny, "no_rule", ""
				}
				r.Full = i%97 == 0
				atomic.AddUint64(&acks.W[w], 1)
				if err := l.Append(&r); err != nil {
					fmt.Println(err)
					os.Exit(1)
				}
				atomic.AddUint64(&acks.W[ackWorkers+w], 1)
				r.Tally.Done(200, r.Trace)
				if i%8 == 0 {
					time.Sleep(50 * time.Microsecond)
				}
			}
		}()
	}
	select {}
}

const ackWorkers = 4

func mapAcks(t testing.TB, path string) *capture.Words {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	w, err := capture.MapWords(f, 512)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestLedgerSurvivesKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	acks := mapAcks(t, path+".acks")
	sum := func(from int) (n uint64) {
		for w := range ackWorkers {
			n += atomic.LoadUint64(&acks.W[from+w])
		}
		return n
	}
	kills := 0
	for deadline := time.Now().Add(5 * time.Minute); sum(ackWorkers) < 50_000 && time.Now().Before(deadline); kills++ {
		cmd := exec.Command(os.Args[0], "-test.run=^TestChildCounts$")
		cmd.Env = append(os.Environ(), "SALLYPORT_LEDGER_CHILD="+path)
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		want := sum(ackWorkers) + 1 + rand.Uint64N(6000)
		for sum(ackWorkers) < want && cmd.ProcessState == nil && time.Now().Before(deadline) {
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
		}
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if strings.Contains(out.String(), "audit") {
			t.Fatalf("child says %q", out.String())
		}
	}
	l := ledgerAt(t, path)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if rep, err := VerifyFile(path, Trust{}); err != nil {
		t.Fatalf("%+v %v", rep, err)
	}
	sums, full := counted(readRecords(t, path))
	begun, acked := sum(0), sum(ackWorkers)
	if acked < 50_000 || sums[""] < acked || sums[""] > begun {
		t.Errorf("after %d kills %d calls are counted, want at least the %d acknowledged and at most the %d begun", kills, sums[""], acked, begun)
	}
	t.Logf("%d kills, %d begun, %d acknowledged, %d counted: %v; in full %v", kills, begun, acked, sums[""], sums, full)
}

// TestLedgerTellsOnce ends the wait for the disk after roll-ups were written:
// neither the next telling nor the next process counts those calls again.
func TestLedgerTellsOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	l := ledgerAt(t, path)
	ended, end := context.WithCancel(t.Context())
	end()
	l.log.syncing <- struct{}{} // somebody else waits for the disk
	for range 3 {
		r := sample()
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
		r.Tally.Done(200, "")
		if err := l.Flush(ended); err == nil {
			t.Fatal("told without a sync")
		}
	}
	sum := func(path string) uint64 {
		t.Helper()
		sums, _ := counted(readRecords(t, path))
		return sums[""]
	}
	killed := filepath.Join(t.TempDir(), "killed")
	if err := os.CopyFS(killed, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	after := filepath.Join(killed, "audit.log")
	if err := ledgerAt(t, after).Close(); err != nil {
		t.Fatal(err)
	}
	if n := sum(after); n != 3 {
		t.Errorf("%d calls are counted after a kill, want 3", n)
	}
	<-l.log.syncing
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if n := sum(path); n != 3 {
		t.Errorf("%d calls are counted after an end in order, want 3", n)
	}
}

func TestTemplate(t *testing.T) {
	for in, want := range map[string]string{
		"/":                           "/",
		"":                            "",
		"/v1/charges":                 "/v1/charges",
		"/v1/charges/42":              "/v1/charges/{}",
		"/v1/charges/42/refunds?x=1":  "/v1/charges/{}/refunds",
		"/oauth2/token":               "/oauth2/token",
		"/u/0f8fad5b-d9cb-469f/edit/": "/u/{}/edit/",
		"/c/deadbeef123":              "/c/{}",
		"/a/%41":                      "/a/{}",
		"/" + strings.Repeat("x", 40): "/{}",
		strings.Repeat("/ab", 90):     strings.Repeat("/ab", 52) + "/**",
	} {
		if got := string(appendTemplate(nil, in)); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}

func TestLedgerHitDoesNotAllocate(t *testing.T) {
	l := ledgerAt(t, filepath.Join(t.TempDir(), "audit.log"))
	r := sample()
	if n := testing.AllocsPerRun(2000, func() {
		r.Seq, r.ID, r.Time = 0, "", time.Time{}
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
		r.Tally.Done(200, r.Trace)
	}); n != 0 {
		t.Errorf("%v allocations per counted call", n)
	}
}

func FuzzCell(f *testing.F) {
	k := cellKey{what: allowed, port: 8443, src: "a", dst: "b", rule: "c", reason: "d", verb: "GET", path: "/"}
	f.Add(k.appendTo(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKey(b)
		if err != nil {
			return
		}
		if again, err := parseKey(k.appendTo(nil)); err != nil || again != k {
			t.Errorf("%+v is read again as %+v, %v", k, again, err)
		}
	})
}

func BenchmarkAuditCount(b *testing.B) {
	l := ledgerAt(b, filepath.Join(b.TempDir(), "audit.log"))
	r := sample()
	b.ReportAllocs()
	for b.Loop() {
		r.ID = ""
		if err := l.Append(&r); err != nil {
			b.Fatal(err)
		}
		r.Tally.Done(200, r.Trace)
	}
}
