package authz

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

func whyJudge(t *testing.T) *Judge {
	t.Helper()
	j, err := NewJudge(JudgeConfig{Audit: audit.NewMemory(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func refuse(t *testing.T, j *Judge, c Call) string {
	t.Helper()
	_, err := j.Judge(&c)
	var d *Denial
	if !errors.As(err, &d) || d.ID == "" {
		t.Fatalf("%+v: %v, want a denial", c, err)
	}
	return d.ID
}

func TestWhy(t *testing.T) {
	j := whyJudge(t)
	c := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/v1/charges/1", Now: mon}
	none := refuse(t, j, c)
	if w, ok := j.Why(none); !ok || w.Reason != NoPolicy || w.Identity != pay.String() {
		t.Errorf("before the first policy: %+v %v", w, ok)
	}
	j.Use(compile(t, shop))
	id := refuse(t, j, c)
	j.Use(compile(t, "p, all, in, **, "+bill.String()+", *, *, **, -, allow")) // explained by what was in force
	w, ok := j.Why(id)
	if !ok || w.Reason != NoRow || w.Nearest == nil || w.Nearest.String() != "pay-bill-1, allow, does not fit: verb is DELETE, the row has GET|POST" {
		t.Errorf("got %+v %v", w, ok)
	}
	if want := "p, payment-billing-1, in, " + pay.String() + ", " + bill.String() + ", 8443, DELETE, /v1/charges/1, -, allow"; w.Add != want {
		t.Errorf("add %q, want %q", w.Add, want)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /why/{id}", j.WhyHandler())
	for path, want := range map[string]int{"/why/" + id: 200, "/why/nothing": 404} {
		rec := httptest.NewRecorder()
		mux.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		if rec.Code != want {
			t.Errorf("%s: %d", path, rec.Code)
		}
		var got Why
		if want == 200 && (json.Unmarshal(rec.Body.Bytes(), &got) != nil || got.Add != w.Add) {
			t.Errorf("%s: %s", path, rec.Body)
		}
	}
}

func TestWhyForgets(t *testing.T) {
	j := whyJudge(t)
	c := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/x", Now: mon}
	var ids []string
	for range keptSets + 1 {
		j.Use(compile(t, shop))
		ids = append(ids, refuse(t, j, c))
	}
	for i, id := range ids {
		if _, ok := j.Why(id); ok != (i > 0) {
			t.Errorf("denial of policy %d: known %v", i, ok)
		}
	}
	path := []byte("/y")
	c.Path = string(path)
	for range keptDenials {
		refuse(t, j, c)
	}
	if _, ok := j.Why(ids[len(ids)-1]); ok {
		t.Error("a denial is known after as many as are kept")
	}
	if _, ok := j.Why(""); ok {
		t.Error("no id is the id of a denial")
	}
}

func TestDenialsTellCallersNothing(t *testing.T) {
	j := whyJudge(t)
	j.Use(compile(t, shop))
	_, err := j.Judge(&Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/x", Now: mon})
	if text := fmt.Sprint(err); strings.Contains(text, "pay-bill") {
		t.Errorf("the error names a row that is near: %s", text)
	}
}

// noRoom is a recorder that keeps nothing.
type noRoom struct{}

func (noRoom) Append(r *audit.Record) error {
	r.ID = "run-r1"
	return errors.New("audit spool is full")
}

// A call that was refused for want of a record is explained, too.
func TestWhyUnrecorded(t *testing.T) {
	j, err := NewJudge(JudgeConfig{Audit: noRoom{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(compile(t, shop))
	id := refuse(t, j, Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/v1/charges/1", Now: mon})
	w, ok := j.Why(id)
	if !ok || w.Allow || w.Reason != Unrecorded || w.Rule != "" || w.Add != "" || w.Identity != pay.String() || !strings.HasSuffix(w.NoAdd, "could not be kept: audit spool is full") {
		t.Errorf("%+v %v", w, ok)
	}
	gap := audit.Record{Kind: audit.KindGap, ID: "later-3", Time: mon, Detail: "1 records could not be written"}
	if r := Unrecordable(id, &gap); r.ID != id || r.Allow || r.Reason != Unrecorded || r.NoAdd == "" || r.Detail != gap.Detail || !r.Time.Equal(mon) {
		t.Errorf("%+v", r)
	}
}
