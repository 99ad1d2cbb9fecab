package test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/audit"
)

const (
	envCrashLog  = "SP_TEST_CRASH_LOG"
	envCrashFrom = "SP_TEST_CRASH_FROM"
	roleCrash    = "audit-writer"

	crashCalls   = 50_000
	crashWorkers = 4
)

// crashCall is the call with a number: most are allowed, one in ten is refused,
// one in fifty is kept in full.
func crashCall(n int) (audit.Record, int) {
	r := audit.Record{
		Kind: audit.KindDecision, Dir: "in", Decision: audit.Allow, Rule: "r1", Port: 8443, Verb: "GET",
		Src: fmt.Sprintf("spiffe://demo.sallyport/caller-%d", n%5), Dst: "spiffe://demo.sallyport/billing",
		Path: fmt.Sprintf("/v1/thing-%c/%d", 'a'+n%4, n), Full: n%50 == 0,
	}
	status := [...]int{200, 200, 404, 500}[n%4]
	if n%10 == 9 {
		r.Decision, r.Reason, r.Rule, status = audit.Deny, "no_row", "", 403
	}
	return r, status
}

// writeUntilKilled is the process that is killed: it records calls, and says on
// stdout before each that it begins and after each that it was acknowledged.
func writeUntilKilled() int {
	from, err := strconv.Atoi(os.Getenv(envCrashFrom))
	if err != nil {
		return 1
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// Files are put aside and roll-ups told as often as a kill can hit them.
	l, err := audit.OpenLedger(audit.Config{Path: os.Getenv(envCrashLog), Log: log, MaxFile: 256 << 10}, audit.LedgerConfig{Window: 100 * time.Millisecond})
	if err != nil {
		log.Error("open", "err", err)
		return 1
	}
	tree, err := l.Tree()
	if err != nil {
		log.Error("open", "err", err)
		return 1
	}
	ctx, end := context.WithCancel(context.Background())
	var background, workers sync.WaitGroup
	background.Go(func() { _ = l.Run(ctx) })
	background.Go(func() { _ = tree.Run(ctx) })
	var next atomic.Int64
	next.Store(int64(from))
	for range crashWorkers {
		workers.Go(func() {
			for {
				n := int(next.Add(1)) - 1
				if n >= crashCalls {
					return
				}
				r, status := crashCall(n)
				fmt.Fprintf(os.Stdout, "begin %d\n", n)
				if err := l.Append(&r); err != nil {
					log.Error("append", "err", err)
					os.Exit(1)
				}
				r.Tally.Done(status, "")
				fmt.Fprintf(os.Stdout, "done %d %s\n", n, r.ID)
			}
		})
	}
	workers.Wait()
	end()
	background.Wait()
	if err := l.Close(); err != nil {
		log.Error("close", "err", err)
		return 1
	}
	return 0
}

// crashRun is what the processes said, over all of them.
type crashRun struct {
	begun, kills int
	acked        map[string]uint64 // by decision
	ids          map[string]bool   // that were acknowledged
	next         int
}

// once runs one process, and kills it after so many acknowledged calls, or when
// it has done all.
func (c *crashRun) once(t *testing.T, path string, kill int) (ended bool) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), envRole+"="+roleCrash, envCrashLog+"="+path, envCrashFrom+"="+strconv.Itoa(c.next))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done, said := 0, bufio.NewReader(out)
	for {
		line, err := said.ReadString('\n')
		if err == io.EOF {
			break // a half line was not said
		}
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(line)
		n, err := strconv.Atoi(f[1])
		if err != nil {
			t.Fatal(err)
		}
		if c.next = max(c.next, n+1); f[0] == "begin" {
			c.begun++
			continue
		}
		r, _ := crashCall(n)
		c.acked[r.Decision]++
		c.ids[stableID(f[2])] = true
		if done++; done == kill {
			// Not at a call: at any instant of the next half millisecond.
			time.Sleep(time.Duration(rand.IntN(500)) * time.Microsecond)
			_ = cmd.Process.Kill()
		}
	}
	err = cmd.Wait()
	if err == nil {
		return true
	}
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || st.Signal() != syscall.SIGKILL {
		t.Fatalf("the writer ended by itself: %v", err)
	}
	c.kills++
	return false
}

// stableID is the part of an id that a restart does not change: a call that was
// only counted has the id of its cell, which the next process tells under its
// own nonce.
func stableID(id string) string {
	if _, cell, ok := strings.Cut(id, "-c"); ok && strings.Contains(cell, ".") {
		return cell
	}
	return id
}

// TestAuditCrash kills the process that records with SIGKILL, again and again
// during 50,000 decisions, and then counts.
func TestAuditCrash(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	c := crashRun{acked: map[string]uint64{}, ids: map[string]bool{}}
	for !c.once(t, path, 1+rand.IntN(5000)) {
	}
	rep, err := audit.VerifyFile(path, audit.Trust{})
	if err != nil {
		t.Fatalf("the log: %v", err)
	}
	sums := map[string]uint64{}
	lost := uint64(0)
	have := map[string]bool{}
	full := 0
	err = audit.Each(path, func(_ []byte, r *audit.Record) error {
		have[stableID(r.ID)] = true
		switch r.Kind {
		case audit.KindRollup:
			sums[r.Decision] += r.Count
			if r.Class == "lost" {
				lost += r.Count
			}
		case audit.KindDecision:
			full++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	missing := 0
	for id := range c.ids {
		if !have[id] {
			missing++
		}
	}
	acked := c.acked[audit.Allow] + c.acked[audit.Deny]
	counted := sums[audit.Allow] + sums[audit.Deny]
	t.Logf("%d kills; %d calls begun, %d acknowledged; %d counted (%d of them cut short), %d kept in full; %d records in all, %d gaps; %d of %d acknowledged ids missing",
		c.kills, c.begun, acked, counted, lost, full, rep.Records, rep.Gaps, missing, len(c.ids))
	if missing > 0 {
		t.Errorf("%d ids that were acknowledged are not in the log", missing)
	}
	for _, d := range []string{audit.Allow, audit.Deny} {
		if sums[d] < c.acked[d] {
			t.Errorf("%d calls with %s are counted, %d were acknowledged", sums[d], d, c.acked[d])
		}
	}
	// A kill may hit each worker between counting a call and saying so; what
	// it began and did not count is no call that was let through.
	if counted > uint64(c.begun) || uint64(c.begun)-acked > uint64(c.kills*crashWorkers) {
		t.Errorf("%d calls are counted and %d acknowledged of %d begun, with %d kills of %d workers", counted, acked, c.begun, c.kills, crashWorkers)
	}
}
