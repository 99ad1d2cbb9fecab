package page_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/page"
	"sallyport/internal/page/pagetest"
)

// TestOneVisitorLeavesRoom opens live views until one is refused.
func TestOneVisitorLeavesRoom(t *testing.T) {
	a := open(t, 5).enter()
	b := *a
	b.enter()
	live := func(s *site) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/live/denied", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+s.session)
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	for i := range 4 {
		if code := live(a).StatusCode; code != 200 {
			t.Fatalf("live view %d: %d", i, code)
		}
	}
	if code := live(a).StatusCode; code != 429 {
		t.Errorf("a fifth live view: %d, want 429", code)
	}
	if code := live(&b).StatusCode; code != 200 {
		t.Errorf("a live view of somebody else: %d", code)
	}
}

// TestWorkIsShared asks for the same map at once, and searches twice.
func TestWorkIsShared(t *testing.T) {
	m := pagetest.New(5, time.Now())
	conf := m.Config()
	srv := httptest.NewUnstartedServer(nil)
	conf.Loopback = srv.Listener.Addr().String()
	made, began, goOn := atomic.Int32{}, make(chan struct{}, 1), make(chan struct{})
	came, allCame := atomic.Int32{}, make(chan struct{})
	conf.Chart = func(context.Context, time.Time, time.Time) (mesh.Chart, error) {
		made.Add(1)
		<-allCame // who comes long after it was made is shown another
		return mesh.Chart{}, nil
	}
	conf.Search = func(context.Context, audit.Filter) (page.Found, error) {
		began <- struct{}{}
		<-goOn
		return page.Found{}, nil
	}
	p, err := page.New(conf)
	if err != nil {
		t.Fatal(err)
	}
	srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/view/map" && came.Add(1) == 8 {
			close(allCame)
		}
		p.Handler().ServeHTTP(w, r)
	})
	srv.Start()
	t.Cleanup(srv.Close)
	s := (&site{t: t, mesh: m, page: p, url: srv.URL}).enter()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { s.do("GET", "/view/map?span=30d", "") })
	}
	all.Wait()
	if n := made.Load(); n != 1 {
		t.Errorf("the map is made %d times, want once", n)
	}
	all.Go(func() { s.do("GET", "/view/audit", "") })
	<-began
	if code, _ := s.do("GET", "/view/audit", ""); code != 429 {
		t.Errorf("a second search: %d, want 429", code)
	}
	close(goOn)
	all.Wait()
	if code, _ := s.do("GET", "/view/audit", ""); code != 200 {
		t.Errorf("a search after it: %d", code)
	}
}
