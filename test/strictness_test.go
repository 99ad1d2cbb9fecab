package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// strictness sums up TestStrictness by class; it is printed with the others.
var strictness = &conformSum{conformResult: conformResult{Name: "strictness", OK: true}}

// What becomes of a message of a case on its way to the application.
const (
	nothing = iota // not a byte of it arrives
	cutOff         // its head arrives, its end never does
	partly         // at most that: it is more than is looked at before its head goes on
	whole          // it arrives, as the case says
)

// A strictCase is one message and what must become of it.
type strictCase struct {
	name string
	say  []string // what is sent, piece by piece; the application has seen the head before the second goes
	doors
	status int  // of the first final answer
	keep   bool // the connection then carries another request
	reach  int
	sees   []string // what the application gets holds these
	hides  []string // and none of these, and neither does the answer
	tells  []string // what the client gets holds these

	answer string        // what the application says; empty: 200 with two bytes
	early  bool          // as soon as it has the head
	hangUp bool          // and then it closes
	gate   chan struct{} // not before this is closed
	fresh  bool          // its connection is not used again
	twice  bool          // the way out tries it once more
}

// doors are the listeners that a case is tried at; none means both.
type doors struct{ in, out bool }

var (
	atIn  = doors{in: true}
	atOut = doors{out: true}
)

// A strictClass is the cases of one kind of trouble. The number is that of the
// row in corpus/http-strictness.md; 0 marks what that list does not have.
type strictClass struct {
	row   int
	name  string
	cases []strictCase
}

const (
	strictHost   = "Host: billing.mesh.internal\r\n"
	strictPath   = "/v1/strict/x"
	smuggledPath = "/v1/strict/smuggled"
	againPath    = "/v1/strict/again"
	again        = "GET " + againPath + " HTTP/1.1\r\n" + strictHost + "Connection: close\r\n\r\n"
	smuggled     = "GET " + smuggledPath + " HTTP/1.1\r\n" + strictHost + "\r\n"
)

// TestStrictness says every byte itself to the two listeners of real sidecars,
// and watches every byte that reaches the application behind the second.
func TestStrictness(t *testing.T) {
	t.Parallel()
	s := newStrictRig(t, "")
	slow := newStrictRig(t, "limits: {head: 2048, headers: 20, target: 512, head_timeout: 1s, body_timeout: 1s, idle_timeout: 1s, refuse_underscores: true, connections: 300}\n")
	trusting := newStrictRig(t, "limits: {path_parameters: true}\n", "inbound: {", fmt.Sprintf("inbound: {forwarded_from: [%q], ", id("/ns/shop/sa/payment")), "outbound:\n", "outbound:\n  keep_forwarded_for: true\n")
	t.Run("a peer that speaks HTTP/3 alone is sent away", func(t *testing.T) {
		only := s.tls.Clone()
		only.NextProtos = []string{"h3"}
		if c, err := tls.Dial("tcp", s.bill.in, only); err == nil {
			c.Close()
			t.Error("it got in")
		}
	})
	for _, c := range strictClasses() {
		s.class(t, c)
	}
	for _, c := range limitClasses() {
		slow.class(t, c)
	}
	for _, c := range trustClasses() {
		trusting.class(t, c)
	}
	strictness.one(t.Run("34 drain", s.drains))
	for _, f := range slices.Concat(s.app.since(0), slow.app.since(0), trusting.app.since(0)) {
		if f.target == smuggledPath {
			t.Errorf("a request in the body of another reached the application: %q", f.raw)
		}
	}
}

// A strictRig is billing's sidecar before an application of the test's, and
// payment's before both.
type strictRig struct {
	w       *world
	app     *bareApp
	bill    *node
	pay     *node
	payment *hand
	billing *proc
	tls     *tls.Config
}

// newStrictRig starts them; conf is added to the configuration of both, in which
// the rest is replaced, old and new by turns.
func newStrictRig(t *testing.T, conf string, replace ...string) *strictRig {
	w := newWorld(t, time.Minute)
	w.extend("access.csv", fmt.Sprintf("p, strict, in, %s, %s, 8443, *, /v1/strict/**, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing")))
	w.startIssuer()
	s := &strictRig{w: w, app: newBareApp(t), bill: &node{name: "billing"}, pay: &node{name: "payment"}}
	w.join(s.bill)
	w.join(s.pay)
	s.bill.app = s.app.addr
	r := strings.NewReplacer(replace...)
	w.write("billing", r.Replace(w.sidecarConfig(s.bill, w.token("billing"))+conf))
	w.write("payment", r.Replace(w.sidecarConfig(s.pay, w.token("payment"))+conf))
	s.billing = w.start("billing", nil, "sidecar", "run", "--config", w.path("billing", "config.yaml"))
	w.awaitReady(s.billing)
	s.payment = w.startNode(s.pay)
	w.minted("/ns/shop/sa/payment", "peer")
	cert, err := tls.LoadX509KeyPair(w.path("peer", "svid.pem"), w.path("peer", "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	// Who answers is not the matter here; what it takes is.
	s.tls = &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}
	s.payment.await("reach billing", func() bool {
		return s.throughOut([]string{again}).Status == http.StatusOK
	})
	return s
}

// throughOut says something to payment's sidecar, as its workload.
func (s *strictRig) throughOut(say []string) saidReply {
	q := sayRequest{Address: s.pay.out}
	for _, piece := range say {
		q.Say = append(q.Say, []byte(piece)) // JSON has no text that is not UTF-8
	}
	return ask[saidReply](s.payment, "/say", q)
}

// throughIn says something to billing's sidecar, as a peer with an SVID.
func (s *strictRig) throughIn(t *testing.T, say []string, between func()) saidReply {
	t.Helper()
	c := s.connect(t)
	defer c.Close()
	return converse(c, say, between)
}

// connect shakes hands with billing's sidecar.
func (s *strictRig) connect(t *testing.T) net.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", s.bill.in, s.tls)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(within))
	return c
}

func (s *strictRig) class(t *testing.T, class strictClass) {
	tried, passed := 0, 0
	t.Run(fmt.Sprintf("%02d %s", class.row, class.name), func(t *testing.T) {
		for _, c := range class.cases {
			if c.doors == (doors{}) {
				c.doors = doors{in: true, out: len(c.say) == 1}
			}
			for _, door := range []string{"in", "out"} {
				if door == "in" && !c.in || door == "out" && !c.out {
					continue
				}
				tried++
				if t.Run(c.name+" "+door, func(t *testing.T) { s.one(t, c, door) }) {
					passed++
				}
			}
		}
	})
	r := conformResult{Name: "HTTP/1.1", OK: tried == passed, Verdicts: []conformVerdict{{
		Name: fmt.Sprintf("%d %s", class.row, class.name), OK: tried == passed, Detail: fmt.Sprintf("%d tried, %d passed", tried, passed),
	}}}
	r.Cases.Tried, r.Cases.Passed, r.Cases.Failed = tried, passed, tried-passed
	strictness.add(r)
}

// one tries one case at one door.
func (s *strictRig) one(t *testing.T, c strictCase, door string) {
	from := s.app.expect(c)
	say := append(c.say[:len(c.say):len(c.say)], again)
	var got saidReply
	if door == "out" {
		got = s.throughOut(say)
	} else {
		got = s.throughIn(t, say, func() { s.w.await("reach the application", s.app.begun) })
	}
	if got.Status != c.status {
		t.Errorf("answered %d %s (%s), want %d", got.Status, got.Body, got.Err, c.status)
	}
	kept := strings.HasPrefix(got.Rest, "HTTP/1.1 200 ")
	if kept != c.keep || !kept && got.Rest != "" {
		t.Errorf("afterwards came %q; kept: want %v", got.Rest, c.keep)
	}
	told := got.Head + got.Body
	c.twice = c.twice && door == "out"
	s.arrived(t, c, from, kept)
	for _, want := range c.tells {
		if !strings.Contains(told, want) {
			t.Errorf("the client got %q, want %q in it", told, want)
		}
	}
	for _, bad := range c.hides {
		if strings.Contains(told, bad) {
			t.Errorf("the client got %q with %q in it", told, bad)
		}
	}
}

// drains ends billing's sidecar while a call is in flight: nobody gets in any
// more, an idle connection ends, the call is answered, and then it exits.
func (s *strictRig) drains(t *testing.T) {
	gate := make(chan struct{})
	s.app.expect(strictCase{gate: gate})
	idle, busy := s.connect(t), s.connect(t)
	defer idle.Close()
	defer busy.Close()
	if _, err := io.WriteString(busy, strictGet("")[0]); err != nil {
		t.Fatal(err)
	}
	s.w.await("have a call in flight", s.app.begun)
	if err := s.billing.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.w.await("be refused", func() bool {
		c, err := net.Dial("tcp", s.bill.in)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	if b, _ := io.ReadAll(idle); len(b) > 0 { // it may end by a reset
		t.Errorf("an idle connection got %q", b)
	}
	close(gate)
	resp, err := http.ReadResponse(bufio.NewReader(busy), nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(b) != "ok" || err != nil || !resp.Close {
		t.Errorf("the call in flight got %d %q (%v), close %v", resp.StatusCode, b, err, resp.Close)
	}
	if code := s.billing.end(); code != 0 {
		t.Errorf("it ended with %d", code)
	}
}

// arrived looks at what the application got.
func (s *strictRig) arrived(t *testing.T, c strictCase, from int, kept bool) {
	t.Helper()
	want := 0
	if c.reach != nothing {
		want++
	}
	if kept {
		want++
	}
	if c.twice {
		want++
	}
	if c.reach == cutOff { // it is known to be cut off when its connection ends
		s.w.await("see the end of a request that is cut off", func() bool { return len(s.app.since(from)) >= want })
	}
	got := s.app.since(from)
	if c.reach == partly {
		if len(got) > 1 || len(got) == 1 && got[0].err == nil {
			t.Errorf("the application got %+v", got)
		}
		return
	}
	if len(got) != want {
		t.Fatalf("the application got %d requests, want %d: %+v", len(got), want, got)
	}
	if kept && got[want-1].target != againPath {
		t.Errorf("the next request arrived as %q", got[want-1].target)
	}
	if c.reach == nothing {
		return
	}
	f := got[0]
	if (f.err != nil) != (c.reach == cutOff) {
		t.Errorf("the application read the request with error %v: %q", f.err, f.raw)
	}
	for _, want := range c.sees {
		if !strings.Contains(f.raw, want) {
			t.Errorf("the application got %q, want %q in it", f.raw, want)
		}
	}
	for _, bad := range c.hides {
		if strings.Contains(f.raw, bad) {
			t.Errorf("the application got %q with %q in it", f.raw, bad)
		}
	}
	if c.fresh && kept && got[want-1].conn == f.conn {
		t.Error("the connection to the application was used again")
	}
}

// A bareApp is an application that keeps every byte it gets.
type bareApp struct {
	addr string

	mu    sync.Mutex // guards what follows
	got   []arrival
	bytes int
	conns int
	next  strictCase // how it answers
}

// An arrival is one request as the application read it, or bytes that are none.
type arrival struct {
	conn                int
	method, target, raw string
	err                 error
}

func newBareApp(t *testing.T) *bareApp {
	t.Helper()
	a := &bareApp{}
	a.addr = serves(t, a.serve)
	return a
}

// expect says how the next request is answered, and where in the list of
// arrivals it will stand.
func (a *bareApp) expect(c strictCase) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.next, a.bytes = c, 0
	return len(a.got)
}

func (a *bareApp) since(from int) []arrival {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]arrival(nil), a.got[from:]...)
}

// begun says whether the application has got anything since expect.
func (a *bareApp) begun() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bytes > 0
}

// A keeper is a reader that keeps what it has read.
type keeper struct {
	a *bareApp
	net.Conn
	kept bytes.Buffer
}

func (k *keeper) Read(p []byte) (int, error) {
	n, err := k.Conn.Read(p)
	k.kept.Write(p[:n])
	k.a.mu.Lock()
	k.a.bytes += n
	k.a.mu.Unlock()
	return n, err
}

func (a *bareApp) serve(c net.Conn) {
	a.mu.Lock()
	a.conns++
	number := a.conns
	a.mu.Unlock()
	k := &keeper{a: a, Conn: c}
	br := bufio.NewReader(k)
	for {
		f := arrival{conn: number}
		req, err := http.ReadRequest(br)
		a.mu.Lock()
		next := a.next
		a.mu.Unlock()
		if err == nil {
			f.method, f.target = req.Method, req.RequestURI
			if next.early && f.target != againPath {
				_, _ = io.WriteString(c, next.answer)
			}
			_, err = io.Copy(io.Discard, req.Body)
		}
		f.raw, f.err = string(k.kept.Next(k.kept.Len()-br.Buffered())), err
		if f.raw == "" {
			return // it was closed between two requests
		}
		a.mu.Lock()
		a.got = append(a.got, f)
		a.mu.Unlock()
		if next.gate != nil && f.target != againPath {
			<-next.gate
		}
		if err != nil || !f.answer(c, next) {
			return
		}
	}
}

// answer answers the request as the case wants it.
func (f *arrival) answer(c net.Conn, next strictCase) bool {
	answer, hangUp := next.answer, next.hangUp
	if answer == "" || f.target == againPath {
		answer, hangUp = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", false
		if f.method == http.MethodHead {
			answer = strings.TrimSuffix(answer, "ok")
		}
	}
	_, err := io.WriteString(c, answer)
	return err == nil && !hangUp
}

// What the test may have a workload say, and what it heard.
type (
	sayRequest struct {
		Address string
		Say     [][]byte
	}
	saidReply struct {
		Status  int
		Interim []int
		Head    string // of the final answer
		Body    string
		Rest    string // what came behind the first answer when the last piece was said
		Err     string // why there was no whole answer
	}
)

func say(_ context.Context, q sayRequest) (saidReply, error) {
	c, err := net.Dial("tcp", q.Address)
	if err != nil {
		return saidReply{}, err
	}
	defer c.Close()
	var pieces []string
	for _, piece := range q.Say {
		pieces = append(pieces, string(piece))
	}
	return converse(c, pieces, nil), nil
}

// converse says the pieces but the last, reads an answer, says the last piece
// and reads until the other end closes. between is called between the pieces
// before the answer.
func converse(c net.Conn, say []string, between func()) (r saidReply) {
	_ = c.SetDeadline(time.Now().Add(within))
	last := len(say) - 1
	for i, piece := range say[:max(last, 1)] {
		if i > 0 && between != nil {
			between()
		}
		if _, err := io.WriteString(c, piece); err != nil {
			break // it was refused before its end: the answer says so
		}
	}
	br := bufio.NewReader(c)
	method, _, _ := strings.Cut(say[0], " ")
	for {
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		if err != nil {
			r.Err = err.Error()
			return r
		}
		if resp.StatusCode < 200 && resp.StatusCode != http.StatusSwitchingProtocols {
			r.Interim = append(r.Interim, resp.StatusCode)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			r.Err = err.Error()
		}
		var head bytes.Buffer
		_ = resp.Header.Write(&head)
		_ = resp.Trailer.Write(&head)
		if resp.Close {
			head.WriteString("Connection: close\r\n")
		}
		r.Status, r.Head, r.Body = resp.StatusCode, head.String(), string(body)
		if resp.StatusCode == http.StatusSwitchingProtocols {
			return r
		}
		break
	}
	if last > 0 {
		if _, err := io.WriteString(c, say[last]); err != nil && !errors.Is(err, net.ErrClosed) {
			r.Err = err.Error()
		}
	}
	rest, _ := io.ReadAll(br)
	r.Rest = string(rest)
	return r
}
