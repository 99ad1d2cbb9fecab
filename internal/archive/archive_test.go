package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"filippo.io/age"
)

// sign stands for a key that this package knows nothing of.
func sign(h Head) ([]byte, error) { return fmt.Appendf(nil, "%s %d %x", h.Origin, h.Size, h.Root), nil }

func open(signed []byte, key string) (h Head, err error) {
	if key != "key" {
		return h, errors.New("another key")
	}
	var root []byte
	if _, err = fmt.Sscanf(string(signed), "%s %d %x", &h.Origin, &h.Size, &root); err == nil {
		copy(h.Root[:], root)
	}
	return h, err
}

type rig struct {
	Config
	auditor *age.X25519Identity
}

func newRig(t *testing.T) *rig {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{auditor: id}
	r.Config = Config{Name: "a", Origin: "o", Key: "key", Sign: sign, Log: slog.New(slog.DiscardHandler)}
	r.Dir, r.Recipients = filepath.Join(t.TempDir(), "a"), []string{id.Recipient().String()}
	return r
}

func (r *rig) open(t *testing.T) *Archive {
	t.Helper()
	a, err := Open(r.Config)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func record(n int) *Record {
	return &Record{
		Time: time.Date(2026, 11, 27, 0, 0, n, 0, time.UTC), Trace: fmt.Sprint(n), Name: "next",
		Request: &Request{Method: "POST", Path: "/x", Query: "token=abc&a=1", Message: Message{
			Headers: []Field{{"Authorization", "Bearer hidden-1"}, {"Cookie", "hidden-2"}, {"Content-Type", "application/json"}, {"X-Plain", "p"}},
			Body:    Body(`{"card":{"number":"hidden-3"},"n":1.50}`)}},
		Primary: &Answer{Status: 200, Message: Message{Headers: []Field{{"Set-Cookie", "hidden-4"}}, Body: Body{0xff, 0xfe}}},
	}
}

// noise is a body that does not become smaller.
func noise() Body {
	b := make(Body, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func (r *rig) read(t *testing.T) (out []*Record) {
	t.Helper()
	if err := Each(r.Dir, []age.Identity{r.auditor}, func(rec *Record) error {
		out = append(out, rec)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestArchiveIsReadByItsAuditorAlone(t *testing.T) {
	r := newRig(t)
	r.Redact = RedactConfig{Query: []string{"token"}, JSON: []string{"card.number"}}
	a := r.open(t)
	for n := range 3 {
		a.Add(record(n))
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a.Add(record(4)) // dropped
	got := r.read(t)
	if len(got) != 3 {
		t.Fatalf("%d records", len(got))
	}
	for n, rec := range got {
		if rec.Trace != fmt.Sprint(n) || rec.Request.Query != "token=[redacted]&a=1" || rec.Request.Get("x-plain") != "p" ||
			rec.Request.Get("authorization") != Redacted || rec.Request.Get("cookie") != Redacted || rec.Primary.Get("set-cookie") != Redacted ||
			string(rec.Request.Body) != `{"card":{"number":"[redacted]"},"n":1.50}` || rec.Primary.Omitted == "" || rec.Primary.Body != nil {
			t.Errorf("%+v %+v", rec.Request, rec.Primary)
		}
	}
	other, _ := age.GenerateX25519Identity()
	if err := Each(r.Dir, []age.Identity{other}, func(*Record) error { return nil }); err == nil {
		t.Error("somebody else can read it")
	}
	files, _ := filepath.Glob(r.Dir + "/*")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		if bytes.Contains(b, []byte("hidden")) || bytes.Contains(b, []byte("X-Plain")) {
			t.Errorf("%s holds what must not be there", f)
		}
		if st, _ := os.Stat(f); st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", f, st.Mode().Perm())
		}
	}
}

func TestBodiesStayAsTheyAreWithoutPaths(t *testing.T) {
	r := newRig(t)
	a := r.open(t)
	a.Add(record(1))
	_ = a.Close()
	rec := r.read(t)[0]
	if string(rec.Request.Body) != `{"card":{"number":"hidden-3"},"n":1.50}` || string(rec.Primary.Body) != "\xff\xfe" {
		t.Errorf("%q %q", rec.Request.Body, rec.Primary.Body)
	}
}

func TestVerifyFindsWhatWasDone(t *testing.T) {
	one := func(t *testing.T, r *rig) string {
		f, _ := filepath.Glob(r.Dir + "/0*.age")
		if len(f) != 3 {
			t.Fatalf("%d segments", len(f))
		}
		return f[1]
	}
	edit := func(t *testing.T, path string, f func([]byte) []byte) {
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, f(b), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, r *rig)
		want string
	}{
		{"nothing", func(*testing.T, *rig) {}, ""},
		{"a byte of a segment changed", func(t *testing.T, r *rig) {
			edit(t, one(t, r), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
		}, "its bytes are not those"},
		{"a segment removed", func(t *testing.T, r *rig) { _ = os.Remove(one(t, r)) }, "no such file"},
		{"a segment added", func(t *testing.T, r *rig) {
			_ = os.WriteFile(filepath.Join(r.Dir, "00000009-x.age"), nil, 0o600)
		}, "is not in the chain"},
		{"the last line removed", func(t *testing.T, r *rig) {
			edit(t, filepath.Join(r.Dir, chainFile), func(b []byte) []byte {
				return b[:bytes.LastIndexByte(b[:len(b)-1], '\n')+1]
			})
		}, "end otherwise"},
		{"a line removed in the middle", func(t *testing.T, r *rig) {
			edit(t, filepath.Join(r.Dir, chainFile), func(b []byte) []byte {
				l := bytes.SplitAfter(b, []byte("\n"))
				return append(l[0], l[2]...)
			})
		}, "line 2: it has the number 3"},
		{"a line changed", func(t *testing.T, r *rig) {
			edit(t, filepath.Join(r.Dir, chainFile), func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"records":1`), []byte(`"records":2`), 1)
			})
		}, "does not follow"},
		{"a line that names another folder", func(t *testing.T, r *rig) {
			edit(t, filepath.Join(r.Dir, chainFile), func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"file":"0`), []byte(`"file":"../0`), 1)
			})
		}, "is no name of a segment"},
		{"half a line", func(t *testing.T, r *rig) {
			edit(t, filepath.Join(r.Dir, chainFile), func(b []byte) []byte { return b[:len(b)-5] })
		}, "unexpected EOF"},
		{"another head", func(t *testing.T, r *rig) {
			edit(t, filepath.Join(r.Dir, headFile), func([]byte) []byte { return []byte("o 3 00") })
		}, "end otherwise"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			r.RotateBytes = 1
			a := r.open(t)
			for n := range 3 {
				a.Add(record(n))
			}
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			tt.do(t, r)
			rep, err := Verify(r.Dir, "key", open)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(rep.Problems, "; "); tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
				t.Errorf("found %q, want %q", got, tt.want)
			}
			if tt.want == "" && (rep.Records != 3 || len(rep.Segments) != 3 || rep.Own) {
				t.Errorf("%+v", rep)
			}
			if rep, err := Verify(r.Dir, "other", open); err != nil || len(rep.Problems) == 0 {
				t.Errorf("another key verifies it: %+v, %v", rep, err)
			}
		})
	}
}

// A process that dies loses at most what was not written yet; the rest is a
// segment that says that it was cut.
func TestArchiveGoesOnAfterACrash(t *testing.T) {
	r := newRig(t)
	a := r.open(t)
	a.Add(record(1))
	if err := a.open.zip.Flush(); err != nil {
		t.Fatal(err)
	}
	big := record(2) // more than age keeps back
	big.Request.Body = noise()
	a.Add(big)
	b := r.open(t) // as another process
	b.Add(record(3))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err := Verify(r.Dir, "", open)
	if err != nil || len(rep.Problems) > 0 || len(rep.Segments) != 2 || !rep.Segments[0].Cut || rep.Segments[1].Cut || !rep.Own {
		t.Fatalf("%+v, %v", rep, err)
	}
	got := r.read(t)
	if len(got) < 2 || got[0].Trace != "1" || got[len(got)-1].Trace != "3" {
		t.Errorf("%d records", len(got))
	}
}

func TestTheOldestGoFirstAndOnlyWhenTheyWereUploaded(t *testing.T) {
	r := newRig(t)
	r.RotateBytes, r.KeepBytes = 1, 1
	up := map[string]int{}
	down := true
	r.Upload = func(_ context.Context, name string, body io.Reader, size int64) error {
		if down {
			return errors.New("down")
		}
		n, err := io.Copy(io.Discard, body)
		if n != size {
			t.Errorf("%s has %d bytes, not %d", name, n, size)
		}
		up[name]++
		return err
	}
	a := r.open(t)
	a.Add(record(1))
	a.look(t.Context())
	a.Add(record(2)) // dropped: full, and nothing may go
	if rep, _ := Verify(r.Dir, "key", open); len(rep.Problems) > 0 || rep.Records != 1 || rep.Removed != 0 {
		t.Fatalf("%+v", rep)
	}
	down = false
	a.look(t.Context())
	if rep, _ := Verify(r.Dir, "key", open); len(rep.Problems) > 0 || len(rep.Segments) != 0 || rep.Removed != 1 {
		t.Fatalf("%+v", rep)
	}
	a.look(t.Context())
	a.Add(record(3))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if rep, _ := Verify(r.Dir, "key", open); len(rep.Problems) > 0 || rep.Records != 1 {
		t.Fatalf("%+v", rep)
	}
	if len(up) != 4 || up[headFile] != 1 {
		t.Errorf("uploaded: %v", up)
	}
}

func TestRunClosesSegmentsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.RotateAfter, r.KeepFor = time.Minute, time.Hour
		a := r.open(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		rec := record(1)
		rec.Time = time.Now()
		a.Add(rec)
		time.Sleep(2 * time.Minute)
		if rep, _ := Verify(r.Dir, "key", open); len(rep.Segments) != 1 {
			t.Errorf("not closed: %+v", rep)
		}
		time.Sleep(2 * time.Hour)
		if rep, _ := Verify(r.Dir, "key", open); len(rep.Segments) != 0 || rep.Removed != 1 {
			t.Errorf("not removed: %+v", rep)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestADiskThatFailsCostsRecords(t *testing.T) {
	r := newRig(t)
	a := r.open(t)
	a.Add(record(1))
	_ = a.open.file.Close() // as a disk that takes nothing more
	big := record(2)
	big.Primary.Body = noise()
	a.Add(big)
	a.Add(record(3)) // it rests
	a.restTil = time.Time{}
	a.Add(record(4))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err := Verify(r.Dir, "key", open)
	if err != nil || len(rep.Problems) > 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	got := r.read(t)
	if len(got) == 0 || got[len(got)-1].Trace != "4" {
		t.Errorf("%d records", len(got))
	}
}

func TestSettingsAreChecked(t *testing.T) {
	r := newRig(t)
	if err := r.Validate(); err != nil {
		t.Error(err)
	}
	bad := Settings{Recipients: []string{"age1nobody"}, RotateBytes: -1, Redact: RedactConfig{Headers: []string{"a b"}, JSON: []string{"a[0]", "a.**", "ok.*.x"}, Query: []string{""}}}
	err := bad.Validate()
	for _, want := range []string{"recipients[0]", "rotate_bytes", "redact.headers[0]", "redact.json[0]", "redact.json[1]", "redact.query[0]"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no complaint about %s: %v", want, err)
		}
	}
	if err := (Settings{}).Validate(); err == nil || !strings.Contains(err.Error(), "recipients: missing") {
		t.Error(err)
	}
}

// Whoever has no Redactor shows no proof of an identity either.
func TestRedactorOfNothing(t *testing.T) {
	for name, r := range map[string]*Redactor{"nil": nil, "zero": {}, "made": NewRedactor(RedactConfig{})} {
		if a, b := r.Field("Set_Cookie", "x"), r.Field("location", "/a?b"); a != Redacted || b != "/a?b" {
			t.Errorf("%s: fields are %q, %q", name, a, b)
		}
		if v := r.Value(map[string]any{"a": "b"}, []string{"c"}); fmt.Sprint(v) != "map[a:b]" {
			t.Errorf("%s: value is %v", name, v)
		}
		rec := &Record{Request: &Request{Query: "a=b", Message: Message{Headers: []Field{{"Authorization", "x"}, {"A", "b"}}, Body: Body("c")}}}
		if r.Record(rec); rec.Request.Headers[0][1] != Redacted || rec.Request.Headers[1][1] != "b" || string(rec.Request.Body) != "c" || rec.Request.Query != "a=b" {
			t.Errorf("%s: record is %+v", name, rec.Request)
		}
	}
}

func TestRedactMissesNoDouble(t *testing.T) {
	for _, tt := range []struct{ body, want string }{
		{`{"card":{"number":"hidden"},"card":{}}`, `{"card":{}}`},
		{`{"items":[{"secret":"hidden"},{"secret":["hidden"]}],"a":{"password":"hidden"}}`, `{"a":{"password":"[redacted]"},"items":[{"secret":"[redacted]"},{"secret":"[redacted]"}]}`},
		{`{"password":{"deep":"hidden"}}`, `{"password":"[redacted]"}`},
		{`{"a":1}{"password":"hidden"}`, ""},
		{"password=hidden", ""},
	} {
		r := NewRedactor(RedactConfig{JSON: []string{"card.number", "items.*.secret", "**.password"}})
		rec := &Record{Request: &Request{Message: Message{Body: Body(tt.body)}}}
		r.Record(rec)
		if got := string(rec.Request.Body); got != tt.want {
			t.Errorf("%s becomes %s, want %s", tt.body, got, tt.want)
		}
	}
	form := &Record{Request: &Request{Message: Message{Headers: []Field{{"Content-Type", "application/x-www-form-urlencoded; charset=utf-8"}}, Body: Body("a=1&pass%77ord=hidden&x=;password=hidden")}}}
	NewRedactor(RedactConfig{Query: []string{"password"}}).Record(form)
	if s := string(form.Request.Body); strings.Contains(s, "hidden") || !strings.HasPrefix(s, "a=1&") {
		t.Error(s)
	}
	// What says of itself that it is a form need not be one.
	for _, tt := range []struct {
		fields []Field
		body   string
		json   []string
	}{
		{[]Field{{"Content-Type", "application/x-www-form-urlencoded"}}, `{"card":"hidden"}`, []string{"card"}},
		{[]Field{{"Content-Type", "application/x-www-form-urlencoded"}, {"Content-Encoding", "gzip"}}, "\x1f\x8bhidden", nil},
	} {
		rec := &Record{Request: &Request{Message: Message{Headers: tt.fields, Body: Body(tt.body)}}}
		NewRedactor(RedactConfig{Query: []string{"password"}, JSON: tt.json}).Record(rec)
		if q := rec.Request; q.Body != nil || q.Omitted == "" {
			t.Errorf("kept %q", q.Body)
		}
	}
}

func FuzzReadChain(f *testing.F) {
	c := chain{}
	l := Link{File: "00000001-ab.age", SHA256: "ab", Records: 1}
	line, _ := c.next(&l)
	f.Add(line)
	c.took(l, line)
	l2 := Link{Removed: []string{"00000001-ab.age"}}
	line2, _ := c.next(&l2)
	f.Add(append(line, line2...))
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := readChain(bytes.NewReader(b))
		for i, l := range c.links {
			if l.Seq != uint64(i)+1 || l.File != "" && !goodFile(l.File) {
				t.Errorf("took %+v", l)
			}
		}
		for _, l := range c.live() {
			if strings.ContainsAny(l.File, `/\`) || l.File == openFile {
				t.Errorf("names %q, %v", l.File, err)
			}
		}
	})
}

func FuzzReadRecords(f *testing.F) {
	f.Add([]byte(`{"name":"n","request":{"method":"GET","body":"x"},"primary":{"status":200,"body_base64":"//4="}}` + "\n"))
	f.Add([]byte("{}\n{"))
	redact := NewRedactor(RedactConfig{JSON: []string{"**.a"}, Query: []string{"q"}})
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = ReadRecords(bytes.NewReader(b), func(r *Record) error {
			redact.Record(r)
			for _, m := range []*Answer{r.Primary, r.Shadow} {
				if m != nil && m.Get("authorization") != "" && m.Get("authorization") != Redacted {
					t.Error("a credential stays")
				}
			}
			return nil
		})
	})
}
