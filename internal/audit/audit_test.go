package audit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func openAt(t testing.TB, path string) *Log {
	t.Helper()
	l, err := Open(Config{Path: path, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func sample() Record {
	return Record{
		Kind: KindDecision, Decision: Allow, Reason: "rule", Rule: "pay-bill-1", Dir: "in",
		Src: "spiffe://corp.example/ns/shop/sa/payment", Dst: "spiffe://corp.example/ns/shop/sa/billing",
		Port: 8443, Verb: "POST", Path: "/v1/charges/42", Revision: 7,
		Trace: "4bf92f3577b34da6a3ce929d0e0e4736", Peer: "127.0.0.1:51000", Duration: 1234567 * time.Nanosecond,
	}
}

func mustAppend(t testing.TB, l *Log, n int) {
	t.Helper()
	for range n {
		r := sample()
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
	}
}

func mustVerify(t testing.TB, path string, records uint64) Report {
	t.Helper()
	rep, err := VerifyFile(path, Trust{})
	if err != nil {
		t.Fatal(err)
	}
	if rep.Records != records {
		t.Fatalf("log has %d records, want %d", rep.Records, records)
	}
	return rep
}

func TestLineIsJSONInFixedOrder(t *testing.T) {
	r := Record{
		Seq: 3, Time: time.Date(2026, 11, 22, 23, 10, 4, 56, time.UTC), Kind: KindEgressClose, ID: "abc-3",
		Decision: Deny, Reason: "rule", Rule: "r", Dir: "out", Src: "s", Dst: "d", Port: 1, Verb: "V", Path: "/p",
		Revision: 9, Trace: "t", Peer: "p", BytesUp: 5, BytesDown: -6, Duration: 1500 * time.Microsecond,
		Class: "2xx", Count: 7, Total: 8, From: time.Date(2026, 11, 22, 23, 10, 0, 0, time.UTC),
		Detail: "a \"q\" \\ \n \x1b[31m \u202e é \xff",
	}
	got := string(appendRecord(nil, &r, &hash{1}))
	want := `{"v":1,"seq":3,"time":"2026-11-22T23:10:04.000000056Z","kind":"egress_close","id":"abc-3","decision":"deny",` +
		`"reason":"rule","rule":"r","dir":"out","src":"s","dst":"d","port":1,"verb":"V","path":"/p","rev":9,"trace":"t",` +
		`"peer":"p","up":5,"down":-6,"ms":1.500,"class":"2xx","n":7,"total":8,"from":"2026-11-22T23:10:00.000000000Z","detail":"a \"q\" \\ \u000a \u001b[31m \u202e é ` + "\ufffd" + `",` +
		`"prev":"01` + strings.Repeat("0", 62) + `"}` + "\n"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if !json.Valid([]byte(got)) {
		t.Error("not JSON")
	}
	back, prev, err := ParseLine([]byte(got))
	if err != nil || prev != (hash{1}) {
		t.Fatalf("read again: %v %x", err, prev)
	}
	r.Detail = strings.Replace(r.Detail, "\xff", "\ufffd", 1)
	if d := cmp.Diff(r, back, cmpopts.EquateComparable(Tally{})); d != "" {
		t.Error(d)
	}
}

func TestSecretsAreNotKept(t *testing.T) {
	l := NewMemory()
	r := Record{
		Kind:   KindTLS,
		Path:   "/cb/eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln?code=s3cret",
		Detail: "header Authorization: Bearer abcdefgh12345 and eyJhbGciOiJub25lIn0.e30. and -----BEGIN PRIVATE KEY-----\nMIIE",
	}
	if err := l.Append(&r); err != nil {
		t.Fatal(err)
	}
	got := l.Records()[0]
	if got.Path != "/cb/[redacted]" {
		t.Errorf("path %q", got.Path)
	}
	if want := "header Authorization: Bearer [redacted] and [redacted] and [redacted]"; got.Detail != want {
		t.Errorf("detail %q", got.Detail)
	}
}

func TestLongTextsAreCut(t *testing.T) {
	l := NewMemory()
	long := strings.Repeat("\x00", 100_000)
	r := Record{Kind: Kind(long), ID: long, Decision: long, Reason: long, Rule: long, Dir: long, Src: long, Dst: long,
		Verb: long, Path: long, Trace: long, Peer: long, Detail: strings.Repeat("é", 5000), Time: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)}
	if err := l.Append(&r); err != nil {
		t.Fatal(err)
	}
	if n := len(l.Lines()); n > maxLine {
		t.Fatalf("line of %d bytes, the limit is %d", n, maxLine)
	}
	if rep, err := Verify(bytes.NewReader(l.Lines())); err != nil || rep.Records != 1 {
		t.Fatal(rep, err)
	}
	if d := l.Records()[0].Detail; len(d) > maxDetail || !strings.HasSuffix(d, "é…") {
		t.Errorf("detail of %d bytes ends in %q", len(d), d[len(d)-6:])
	}
}

func TestAppendFillsAndChains(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openAt(t, path)
	seen := map[string]bool{}
	for i := range 300 {
		r := sample()
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
		if r.Seq != uint64(i+1) || r.Time.IsZero() || seen[r.ID] || !strings.HasSuffix(r.ID, fmt.Sprintf("-%x", r.Seq)) {
			t.Fatalf("record %+v", r)
		}
		seen[r.ID] = true
	}
	own := Record{Kind: KindAdmin, ID: "mine", Time: time.Now().Add(time.Hour)}
	if err := l.Append(&own); err != nil || own.ID != "mine" || own.Seq != 301 {
		t.Fatalf("%+v %v", own, err)
	}
	rep := mustVerify(t, path, 301)
	if seq, sum := l.Head(); seq != 301 || fmt.Sprintf("%x", sum) != rep.Head {
		t.Errorf("head %d %x, report %+v", seq, sum, rep)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", st.Mode(), err)
	}
}

func TestReopenContinuesTheChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	for i := range 3 {
		l := openAt(t, path)
		mustAppend(t, l, 5)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		mustVerify(t, path, uint64(5*(i+1)))
	}
}

func TestSecondWriterIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	openAt(t, path)
	if _, err := Open(Config{Path: path, Log: quiet()}); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	foreign := filepath.Join(dir, "foreign")
	if err := os.WriteFile(foreign, []byte("root:x:0:0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(foreign, link); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"somebody else's file": foreign,
		"a symbolic link":      link,
		"a folder":             dir,
		"a missing folder":     filepath.Join(dir, "none", "audit.log"),
		"no path":              "",
	} {
		if l, err := Open(Config{Path: path, Log: quiet()}); err == nil {
			l.Close()
			t.Errorf("%s was opened", name)
		}
	}
	if b, _ := os.ReadFile(foreign); string(b) != "root:x:0:0\n" {
		t.Errorf("foreign file is now %q", b)
	}
}

func TestTornEndIsMovedAway(t *testing.T) {
	for name, tc := range map[string]struct {
		kept uint64 // records before the gap record
		edit func([]byte) []byte
	}{
		"half a line":              {edit: func(b []byte) []byte { return b[:len(b)-30] }, kept: 4},
		"a line without its feed":  {edit: func(b []byte) []byte { return b[:len(b)-1] }, kept: 4},
		"zeros after a power loss": {edit: func(b []byte) []byte { return append(b, make([]byte, 4096)...) }, kept: 5},
		"zeros within lines":       {edit: func(b []byte) []byte { return append(b, "\x00\x00\n\x00{\n"...) }, kept: 5},
		"only half a first line":   {edit: func(b []byte) []byte { return b[:50] }, kept: 0},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			l := openAt(t, path)
			mustAppend(t, l, 5)
			l.Close()
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, tc.edit(b), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := VerifyFile(path, Trust{}); !errors.Is(err, ErrBroken) {
				t.Fatalf("the torn log verifies: %v", err)
			}
			l = openAt(t, path)
			mustAppend(t, l, 2)
			rep := mustVerify(t, path, tc.kept+3)
			if rep.Gaps != 1 {
				t.Errorf("%d gaps", rep.Gaps)
			}
			if st, err := os.Stat(path + ".torn-1"); err != nil || st.Mode().Perm() != 0o600 || st.Size() == 0 {
				t.Errorf("torn file: %v %v", st, err)
			}
		})
	}
}

// failing is a disk that can be told to fail.
type failing struct {
	memory
	write, truncate, sync error
	part                  int
}

func (f *failing) Write(b []byte) (int, error) {
	if f.write != nil {
		n, _ := f.memory.Write(b[:f.part])
		return n, f.write
	}
	return f.memory.Write(b)
}

func (f *failing) Truncate(n int64) error {
	if f.truncate != nil {
		return f.truncate
	}
	return f.memory.Truncate(n)
}

func (f *failing) Sync() error { return f.sync }

func withDisk(f *failing) *Log {
	l := NewMemory()
	l.file, l.mem = f, &f.buf
	return l
}

func TestFailedWriteIsToldAndMended(t *testing.T) {
	full := errors.New("no space left on device")
	f := &failing{part: 37}
	l := withDisk(f)
	mustAppend(t, l, 2)
	f.write, f.truncate = full, full
	for range 3 {
		r := sample()
		if err := l.Append(&r); !errors.Is(err, full) || r.Seq != 0 || !strings.HasPrefix(r.ID, l.nonce+"r") {
			t.Fatalf("%v %+v", err, r)
		}
	}
	if err := l.Healthy(); !errors.Is(err, full) {
		t.Fatalf("healthy: %v", err)
	}
	f.write, f.truncate = nil, nil
	mustAppend(t, l, 1)
	if err := l.Healthy(); err != nil {
		t.Fatal(err)
	}
	rep, err := Verify(bytes.NewReader(l.Lines()))
	if err != nil || rep.Records != 4 || rep.Gaps != 1 {
		t.Fatalf("%+v %v", rep, err)
	}
	if d := l.Records()[2].Detail; !strings.HasPrefix(d, "3 records could not be written") {
		t.Errorf("gap record says %q", d)
	}
}

func TestRunSyncsUntilTheEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openAt(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				r := sample()
				if err := l.Append(&r); err != nil {
					t.Error(err)
				}
				if err := l.Sync(ctx); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	mustAppend(t, l, 1)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	l.mu.Lock()
	if l.synced != 161 {
		t.Errorf("synced to %d of 161", l.synced)
	}
	l.mu.Unlock()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	r := sample()
	if err := l.Append(&r); !errors.Is(err, ErrClosed) {
		t.Errorf("append to a closed log: %v", err)
	}
	if err := l.Sync(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("sync of a closed log: %v", err)
	}
}

func TestFilesArePutAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(Config{Path: path, Log: quiet(), MaxFile: 2000})
	if err != nil {
		t.Fatal(err)
	}
	tail, err := OpenTail(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tail.Close()
	for i := range 40 {
		mustAppend(t, l, 1)
		if i%7 == 0 {
			readUpTo(t, tail, uint64(i+1))
		}
	}
	l.Close()
	names, err := Segments(path)
	if err != nil || len(names) < 5 {
		t.Fatalf("%v %v", names, err)
	}
	mustVerify(t, path, 40)
	readUpTo(t, tail, 40)

	// A crash between putting aside and the first record of the new file.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	rep, _ := VerifyFile(path, Trust{})
	l = openAt(t, path)
	mustAppend(t, l, 1)
	mustVerify(t, path, rep.Records+1)

	// A crash while putting aside: one file with two names.
	if err := os.Link(path, segmentName(path, rep.Last+1)); err != nil {
		t.Fatal(err)
	}
	l.Close()
	l = openAt(t, path)
	mustAppend(t, l, 1)
	mustVerify(t, path, rep.Records+2)
	for after := range rep.Last {
		resumed, err := OpenTail(path, after)
		if err != nil {
			t.Fatal(err)
		}
		readUpTo(t, resumed, after+1)
		resumed.Close()
	}
}

// readUpTo reads the tail until the record seq.
func readUpTo(t *testing.T, tail *Tail, seq uint64) {
	t.Helper()
	for {
		b, n, err := tail.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, _, err := ParseLine(b)
		if err != nil || r.Seq != n {
			t.Fatalf("%s: %v", b, err)
		}
		if n == seq {
			return
		}
	}
}

func TestTailWaitsForTheLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	tail, err := OpenTail(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tail.Close()
	got := make(chan uint64)
	go func() {
		for range 20 {
			_, seq, err := tail.Next(t.Context())
			if err != nil {
				t.Error(err)
			}
			got <- seq
		}
	}()
	l := openAt(t, path)
	for i := range uint64(20) {
		mustAppend(t, l, 1)
		if seq := <-got; seq != i+1 {
			t.Fatalf("read %d, want %d", seq, i+1)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := tail.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}

func TestTailDoesNotReturnATornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openAt(t, path)
	mustAppend(t, l, 2)
	l.Close()
	b, _ := os.ReadFile(path)
	if err := os.WriteFile(path, b[:len(b)-20], 0o600); err != nil {
		t.Fatal(err)
	}
	tail, _ := OpenTail(path, 0)
	defer tail.Close()
	readUpTo(t, tail, 1)
	if b, _, err := tail.poll(); b != nil || err != nil {
		t.Fatalf("%s %v", b, err)
	}
	openAt(t, path)
	line, seq, err := tail.Next(t.Context())
	if err != nil || seq != 2 || !bytes.Contains(line, []byte(`"kind":"gap"`)) {
		t.Errorf("%s %d %v", line, seq, err)
	}
}

func TestTailNamesAMissingRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openAt(t, path)
	mustAppend(t, l, 3)
	lines := bytes.SplitAfter(mustRead(t, path), []byte("\n"))
	if err := os.WriteFile(path, append(bytes.Clone(lines[0]), lines[2]...), 0o600); err != nil {
		t.Fatal(err)
	}
	tail, _ := OpenTail(path, 0)
	defer tail.Close()
	readUpTo(t, tail, 1)
	if _, _, err := tail.Next(t.Context()); err == nil || !strings.Contains(err.Error(), "record 2 is missing") {
		t.Errorf("got %v", err)
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestVerifyTellsWhatIsWrong(t *testing.T) {
	l := NewMemory()
	mustAppend(t, l, 6)
	good := bytes.SplitAfter(l.Lines(), []byte("\n"))[:6]
	back := Record{Kind: KindAdmin, Time: time.Now().Add(-time.Hour)}
	if err := l.Append(&back); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		log                           []byte
		integrity, completeness, time int // line that fails, 0 none
	}{
		"good":              {log: bytes.Join(good, nil)},
		"empty":             {},
		"a changed field":   {log: bytes.Replace(bytes.Join(good, nil), []byte(`"port":8443`), []byte(`"port":8444`), 1), integrity: 2},
		"a removed line":    {log: bytes.Join([][]byte{good[0], good[1], good[3]}, nil), integrity: 3, completeness: 3},
		"a doubled line":    {log: bytes.Join([][]byte{good[0], good[1], good[1]}, nil), integrity: 3, completeness: 3},
		"swapped lines":     {log: bytes.Join([][]byte{good[0], good[2], good[1]}, nil), integrity: 2, completeness: 2},
		"a lost beginning":  {log: bytes.Join(good[2:], nil), completeness: 1},
		"a blank":           {log: bytes.Replace(bytes.Join(good, nil), []byte(`"port":8443`), []byte(`"port": 8443`), 1), integrity: 1},
		"a second key":      {log: bytes.Replace(bytes.Join(good, nil), []byte(`"port":8443`), []byte(`"port":8443,"port":8443`), 1), integrity: 1},
		"an unknown key":    {log: bytes.Replace(bytes.Join(good, nil), []byte(`"port":8443`), []byte(`"port":8443,"x":1`), 1), integrity: 1},
		"no JSON":           {log: append(bytes.Clone(good[0]), "hello\n"...), integrity: 2},
		"a torn end":        {log: append(bytes.Clone(good[0]), good[1][:40]...), completeness: 2},
		"an endless line":   {log: append(bytes.Repeat([]byte("x"), 3*maxLine), '\n'), integrity: 1},
		"a clock set back":  {log: l.Lines(), time: 7},
		"carriage returns":  {log: bytes.ReplaceAll(bytes.Join(good, nil), []byte("\n"), []byte("\r\n")), integrity: 1},
		"another version":   {log: bytes.Replace(good[0], []byte(`"v":1`), []byte(`"v":2`), 1), integrity: 1},
		"a blank last line": {log: append(bytes.Join(good, nil), '\n'), integrity: 7},
	} {
		t.Run(name, func(t *testing.T) {
			rep, err := Verify(bytes.NewReader(tc.log))
			if got := [3]int{rep.Integrity.Line, rep.Completeness.Line, rep.Time.Line}; got != [3]int{tc.integrity, tc.completeness, tc.time} {
				t.Errorf("lines %v, want %v: %+v", got, [3]int{tc.integrity, tc.completeness, tc.time}, rep)
			}
			if bad := tc.integrity+tc.completeness+tc.time > 0; bad != errors.Is(err, ErrBroken) || bad != (rep.Err() != nil) {
				t.Errorf("error %v, report %v", err, rep.Err())
			}
		})
	}
}

// TestChildAppends is the child of TestSurvivesKill: it appends and says so
// until it is killed.
func TestChildAppends(t *testing.T) {
	path := os.Getenv("SALLYPORT_AUDIT_CHILD")
	if path == "" {
		return
	}
	l, err := Open(Config{Path: path, Log: quiet()})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go l.Run(context.Background())
	var mu sync.Mutex
	for range 4 {
		go func() {
			for {
				r := sample()
				if err := l.Append(&r); err != nil {
					fmt.Println(err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println("acknowledged", r.ID)
				mu.Unlock()
			}
		}()
	}
	select {}
}

func TestSurvivesKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	told := map[string]bool{}
	for round := range 4 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestChildAppends$")
		cmd.Env = append(os.Environ(), "SALLYPORT_AUDIT_CHILD="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(out)
		for n := 0; sc.Scan(); n++ {
			id, ok := strings.CutPrefix(sc.Text(), "acknowledged ")
			if !ok {
				if n < 500*(round+1) {
					t.Fatalf("child says %q", sc.Text())
				}
				continue // the line that the kill cut
			}
			told[id] = true
			if n == 500*(round+1) {
				if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
	}
	l := openAt(t, path) // mends the end if the last kill tore it
	mustAppend(t, l, 1)
	if rep, err := VerifyFile(path, Trust{}); err != nil {
		t.Fatalf("%+v %v", rep, err)
	}
	have := map[string]bool{}
	for b := range bytes.Lines(mustRead(t, path)) {
		r, _, err := ParseLine(b)
		if err != nil {
			t.Fatal(err)
		}
		have[r.ID] = true
	}
	missing := 0
	for id := range told {
		if !have[id] {
			missing++
		}
	}
	if missing > 0 || len(told) < 5000 {
		t.Errorf("%d of %d acknowledged records are missing", missing, len(told))
	}
}

func TestAppendDoesNotAllocate(t *testing.T) {
	l := openAt(t, filepath.Join(t.TempDir(), "audit.log"))
	r := sample()
	if n := testing.AllocsPerRun(2000, func() {
		r.Seq, r.ID, r.Time = 0, "", time.Time{}
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations per record", n)
	}
}

// FuzzVerify changes one byte of a good log: it must not verify, unless the
// byte is in the last line, which nothing in the file vouches for.
func FuzzVerify(f *testing.F) {
	l := NewMemory()
	mustAppend(f, l, 4)
	good := l.Lines()
	last := bytes.LastIndexByte(good[:len(good)-1], '\n')
	f.Add(uint16(10), byte(1), []byte(nil))
	f.Fuzz(func(t *testing.T, at uint16, flip byte, raw []byte) {
		if _, err := Verify(bytes.NewReader(raw)); err == nil && len(raw) > 0 {
			if _, _, err := ParseLine(raw[:bytes.IndexByte(raw, '\n')+1]); err != nil {
				t.Errorf("%q verifies", raw)
			}
		}
		if int(at) > last || flip == 0 {
			return
		}
		bad := bytes.Clone(good)
		bad[at] ^= flip
		if _, err := Verify(bytes.NewReader(bad)); !errors.Is(err, ErrBroken) {
			t.Errorf("byte %d changed from %q to %q: %v", at, good[at], bad[at], err)
		}
	})
}

func BenchmarkAuditAppend(b *testing.B) {
	l := openAt(b, filepath.Join(b.TempDir(), "audit.log"))
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	r := sample()
	b.ReportAllocs()
	for b.Loop() {
		r.Seq, r.ID, r.Time = 0, "", time.Time{}
		if err := l.Append(&r); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

func BenchmarkAuditEncode(b *testing.B) {
	r := sample()
	r.Seq, r.Time, r.ID = 1<<20, time.Now(), "k3v9q2-1f"
	var prev hash
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = appendRecord(buf[:0], &r, &prev)
	}
	b.SetBytes(int64(len(buf)))
}

func BenchmarkAuditVerify(b *testing.B) {
	l := NewMemory()
	mustAppend(b, l, 1000)
	lines := l.Lines()
	b.SetBytes(int64(len(lines)))
	for b.Loop() {
		if _, err := Verify(bytes.NewReader(lines)); err != nil {
			b.Fatal(err)
		}
	}
}
