package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
)

var (
	nodeA   = spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/node-a")
	nodeB   = spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/node-b")
	billing = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/billing")
)

type desk struct {
	*received
	t     *testing.T
	clock time.Time
	told  []audit.Record
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{t: t, clock: time.Unix(1e9, 0)}
	r, err := openReceived(filepath.Join(t.TempDir(), "received"), audit.KeepConfig{}, slog.New(slog.DiscardHandler), func(r *audit.Record) error {
		d.told = append(d.told, *r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	r.now = func() time.Time { return d.clock }
	d.received = r
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *desk) receive(agent, workload spiffeid.ID, lines [][]byte) {
	d.t.Helper()
	if err := d.Receive(d.t.Context(), agent, workload, lines); err != nil {
		d.t.Fatal(err)
	}
}

// file is a received file as it stands.
func (d *desk) file(name string) string {
	d.t.Helper()
	b, err := os.ReadFile(filepath.Join(d.dir, name))
	if err != nil {
		d.t.Fatal(err)
	}
	return string(b)
}

// log makes the lines of a proxy's audit log.
func proxyLog(t *testing.T, n int) [][]byte {
	t.Helper()
	l := audit.NewMemory()
	for range n {
		if err := l.Append(&audit.Record{Kind: audit.KindDecision, Decision: audit.Allow, Src: "a", Dst: "b"}); err != nil {
			t.Fatal(err)
		}
	}
	return bytes.Split(bytes.TrimSpace(l.Lines()), []byte("\n"))
}

func text(lines [][]byte) string { return string(bytes.Join(lines, []byte("\n"))) + "\n" }

// Two nodes run a proxy of one workload: neither can touch the other's copy.
func TestTwoNodesOfOneWorkloadHaveTwoCopies(t *testing.T) {
	d := newDesk(t)
	a, b := proxyLog(t, 5), proxyLog(t, 5)
	d.receive(nodeA, billing, a[:3])
	d.receive(nodeB, billing, b[:3])
	d.receive(nodeA, billing, a[2:])
	d.receive(nodeB, billing, b[3:])
	if got := d.file("ns~shop~sa~billing@join_token~node-a.jsonl"); got != text(a) {
		t.Errorf("node-a's copy:\n%s", got)
	}
	if got := d.file("ns~shop~sa~billing@join_token~node-b.jsonl"); got != text(b) {
		t.Errorf("node-b's copy:\n%s", got)
	}
	if len(d.told) > 0 {
		t.Errorf("told %+v", d.told)
	}
}

// What does not continue the copy is kept apart, and said; the copy stays what
// it was, and the proxy is not stuck.
func TestWhatDoesNotContinueIsKeptApart(t *testing.T) {
	lines, other := proxyLog(t, 8), proxyLog(t, 8)
	forged := bytes.Replace(lines[3], []byte(`"allow"`), []byte(`"deny"`), 1)
	for name, batch := range map[string][][]byte{
		"a forged line":     {forged, lines[4]},
		"records missing":   lines[5:],
		"another log":       other[4:],
		"no record at all":  {[]byte(`{"v":1,"seq":4}`)},
		"text":              {[]byte("hello")},
		"starts in between": {lines[3], other[0], other[1]},
		"starts too often":  other[:2],
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			d.receive(nodeA, billing, lines[:3])
			d.receive(nodeA, billing, batch)
			d.receive(nodeA, billing, batch)
			copied := d.file("ns~shop~sa~billing@join_token~node-a.jsonl")
			if name != "a forged line" && copied != text(lines[:3]) {
				t.Errorf("the copy changed:\n%s", copied)
			}
			if got := d.file("ns~shop~sa~billing@join_token~node-a.jsonl.loose"); !strings.HasPrefix(got, text(batch)) {
				t.Errorf("kept apart:\n%s", got)
			}
			if len(d.told) != 1 || d.told[0].Kind != audit.KindGap || d.told[0].Src != billing.String() {
				t.Errorf("told %+v, want one gap", d.told)
			}
		})
	}
}

// A proxy whose disk is full keeps no note of how far it has come, and sends its
// log from the first record.
func TestTheSameLogFromItsFirstRecord(t *testing.T) {
	d := newDesk(t)
	lines := proxyLog(t, 8)
	d.receive(nodeA, billing, lines[:3])
	d.receive(nodeA, billing, lines[:5])
	d.receive(nodeA, billing, lines)
	if got := d.file("ns~shop~sa~billing@join_token~node-a.jsonl"); got != text(lines) {
		t.Errorf("the copy:\n%s", got)
	}
	if len(d.told) > 0 {
		t.Errorf("told %+v", d.told)
	}
}

func TestALogThatStartsAgainIsANewCopy(t *testing.T) {
	d := newDesk(t)
	lines, again := proxyLog(t, 3), proxyLog(t, 2)
	d.receive(nodeA, billing, lines)
	d.clock = d.clock.Add(2 * startsApart)
	d.receive(nodeA, billing, again)
	if got := d.file("ns~shop~sa~billing@join_token~node-a.jsonl"); got != text(again) {
		t.Errorf("the new copy:\n%s", got)
	}
	if got := d.file("ns~shop~sa~billing@join_token~node-a.jsonl.old-1"); got != text(lines) {
		t.Errorf("the former copy:\n%s", got)
	}
}

func TestALongNameIsAFileName(t *testing.T) {
	d := newDesk(t)
	long := spiffeid.RequireFromString("spiffe://corp.example/" + strings.Repeat("a", 1500))
	d.receive(nodeA, long, proxyLog(t, 1))
	d.receive(nodeB, long, proxyLog(t, 1))
	files, err := os.ReadDir(d.dir)
	if err != nil || len(files) != 2 {
		t.Errorf("%d files, %v; want 2", len(files), err)
	}
}

// The last of the disk is the issuer's own: without its records it signs
// nothing.
func TestTheLastOfTheDiskIsNotForProxies(t *testing.T) {
	d := newDesk(t)
	d.free = func() (uint64, uint64, error) { return 4 << 30, 100 << 30, nil }
	d.receive(nodeA, billing, proxyLog(t, 1))
	d.free = func() (uint64, uint64, error) { return 1<<30 - 1, 100 << 30, nil }
	if err := d.Receive(t.Context(), nodeA, billing, proxyLog(t, 1)); err == nil || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("with a full disk: %v", err)
	}
}
