package page

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

const (
	// A link waits this long to be opened, and who has entered by one stays.
	linkLife    = 10 * time.Minute
	sessionLife = 12 * time.Hour
	// maxLinks and maxSessions bound those that are good at once: the oldest goes.
	maxLinks    = 32
	maxSessions = 128
	// maxOwn is how many of each one person has.
	maxOwn = 8
	// tellApart is the least time between two records that one was refused.
	tellApart = time.Minute
	// enterApart is the least time between two records that the holder of a
	// certificate looks: no link is opened, which would be recorded.
	enterApart = time.Hour
)

// csrfHeader shows that a write comes from the page: nobody else knows what it
// must say. Sessions are no cookies, which every port of this machine would be
// sent; but a browser shows a client certificate wherever it is led.
const csrfHeader = "Sallyport-Csrf"

// A visitor is who a request comes from.
type visitor struct {
	// id is zero for the user of this machine who brought a link.
	id     spiffeid.ID
	serial string
	peer   string
	// session is empty for who proved an identity by a certificate.
	session string
	until   time.Time
	// role is that of a person whom a provider has named; id is then made of it.
	role string
}

// by names a visitor in records.
func (c *visitor) by() string {
	if c.id.IsZero() {
		return "local"
	}
	return c.id.String()
}

// A pass is good until a time: for the user of this machine, or for the person that
// a provider has named.
type pass struct {
	until time.Time
	id    spiffeid.ID
	role  string
	// browser is what the enterCookie of the person's browser says, of a link.
	browser string
}

// A door knows who may come in by a link.
type door struct {
	key [32]byte // of the csrf texts, and of sign-ins

	mu       sync.Mutex // guards the fields below
	links    map[[32]byte]pass
	sessions map[[32]byte]pass
	told     map[string]time.Time
	entered  map[string]time.Time // by the serial of a certificate
}

// tell says if the refusal of a visitor is to be recorded: now and then, since
// it costs nothing to be refused again and again.
func (d *door) tell(who string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if last, known := d.told[who]; known && now.Sub(last) < tellApart {
		return false
	}
	if len(d.told) >= maxSessions {
		clear(d.told)
	}
	d.told[who] = now
	return true
}

// inside says if it is recorded that the holder of a certificate looks.
func (d *door) inside(c *visitor, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	last, known := d.entered[c.serial]
	return c.serial == "" || known && now.Sub(last) < enterApart
}

// comesIn notes that it is recorded.
func (d *door) comesIn(c *visitor, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.entered) >= maxSessions {
		clear(d.entered)
	}
	d.entered[c.serial] = now
}

func (d *door) init() {
	_, _ = rand.Read(d.key[:]) // it never fails
	d.entered = map[string]time.Time{}
	d.links, d.sessions, d.told = map[[32]byte]pass{}, map[[32]byte]pass{}, map[string]time.Time{}
}

// put keeps a pass, whose secret is known by its hash alone.
func put(m map[[32]byte]pass, secret string, x pass, most int) {
	for len(m) >= most {
		delete(m, oldest(m))
	}
	m[sha256.Sum256([]byte(secret))] = x
}

// NewLink makes a link that opens the page once, for the user of this machine.
// The token stands behind the '#', which a browser sends to nobody.
func (p *Page) NewLink(context.Context) (link string, expires time.Time, err error) {
	if p.cfg.Loopback == "" {
		return "", time.Time{}, errors.New("the page is served by mutual TLS: open it with a client certificate")
	}
	token := rand.Text() + rand.Text()
	expires = p.cfg.Now().Add(linkLife)
	p.door.mu.Lock()
	defer p.door.mu.Unlock()
	put(p.door.links, token, pass{until: expires}, maxLinks)
	return "http://" + p.cfg.Loopback + "/denied#" + token, expires, nil
}

// enter takes a token and gives out a session.
func (p *Page) enter(w http.ResponseWriter, r *http.Request) {
	var in struct{ Token string }
	if p.cfg.Loopback == "" && p.provider == nil || json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&in) != nil {
		http.Error(w, "no link opens this", http.StatusBadRequest)
		return
	}
	if !sameOrigin(r) {
		http.Error(w, "this was not sent by the page", http.StatusForbidden)
		return
	}
	now, hash := p.cfg.Now(), sha256.Sum256([]byte(in.Token))
	p.door.mu.Lock()
	link, known := p.door.links[hash]
	delete(p.door.links, hash)
	p.door.mu.Unlock()
	if known = known && link.of(r); link.browser != "" {
		http.SetCookie(w, &http.Cookie{Name: enterCookie, Path: "/", MaxAge: -1, Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	}
	if !known || !now.Before(link.until) {
		http.Error(w, "this link was opened before, or is too old; make another: sallyport page", http.StatusForbidden)
		return
	}
	c := &visitor{id: link.id, role: link.role, peer: r.RemoteAddr, session: rand.Text() + rand.Text(), until: now.Add(sessionLife)}
	if c.role != "" {
		c.until = now.Add(personLife)
	}
	if !p.mayView(w, r, c, true) {
		return
	}
	p.door.mu.Lock()
	crowdOut(p.door.sessions, c.id)
	put(p.door.sessions, c.session, pass{until: c.until, id: c.id, role: c.role}, maxSessions)
	p.door.mu.Unlock()
	p.session(w, r, c)
}

// of says that the browser has brought back what it was given with a link. One of the
// user of this machine was given to no browser.
func (x *pass) of(r *http.Request) bool {
	if x.browser == "" {
		return true
	}
	c, err := r.Cookie(enterCookie)
	return err == nil && hmac.Equal([]byte(c.Value), []byte(x.browser))
}

// crowdOut makes room for a pass of a person who has as many as anybody may, so that
// it takes none from others.
func crowdOut(m map[[32]byte]pass, id spiffeid.ID) {
	if id.IsZero() {
		return // the user of this machine has all of them
	}
	own := map[[32]byte]pass{}
	for k, x := range m {
		if x.id == id {
			own[k] = x
		}
	}
	for len(own) >= maxOwn {
		k := oldest(own)
		delete(own, k)
		delete(m, k)
	}
}

// oldest is the pass that ends first.
func oldest(m map[[32]byte]pass) (key [32]byte) {
	var at time.Time
	for k, x := range m {
		if at.IsZero() || x.until.Before(at) {
			key, at = k, x.until
		}
	}
	return key
}

// session tells a visitor who it is and what it may do.
func (p *Page) session(w http.ResponseWriter, _ *http.Request, c *visitor) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"session": c.session, "csrf": p.csrf(c), "who": c.by(), "trust_domain": p.cfg.TrustDomain.Name(),
	})
}

func (p *Page) csrf(c *visitor) string {
	m := hmac.New(sha256.New, p.door.key[:])
	fmt.Fprintf(m, "%s\n%s", c.by(), c.session)
	return hex.EncodeToString(m.Sum(nil))
}

// guard lets visitors in who may see the page.
func (p *Page) guard(next func(http.ResponseWriter, *http.Request, *visitor)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := p.who(r)
		if c == nil {
			if p.provider != nil {
				w.Header().Set(signinHeader, "/oidc/signin")
				http.Error(w, "nobody has entered here; sign in", http.StatusUnauthorized)
				return
			}
			http.Error(w, "nobody has entered here; open a link of: sallyport page", http.StatusUnauthorized)
			return
		}
		if !p.mayView(w, r, c, false) {
			return
		}
		next(w, r, c)
	}
}

// who reads who a request comes from; nil when that is nobody known. Who has signed
// in is that person, also with a certificate.
func (p *Page) who(r *http.Request) *visitor {
	session, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if p.cfg.Loopback == "" && (!ok || p.provider == nil) {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || len(r.TLS.PeerCertificates[0].URIs) != 1 {
			return nil
		}
		leaf := r.TLS.PeerCertificates[0]
		id, err := spiffeid.FromURI(leaf.URIs[0])
		c := &visitor{id: id, serial: mesh.SerialText(leaf.SerialNumber), peer: r.RemoteAddr, until: leaf.NotAfter}
		if err != nil || !id.MemberOf(p.cfg.TrustDomain) || !p.proves(c) {
			return nil
		}
		return c
	}
	if !ok || session == "" {
		return nil
	}
	p.door.mu.Lock()
	x, known := p.door.sessions[sha256.Sum256([]byte(session))]
	p.door.mu.Unlock()
	if !known || !p.cfg.Now().Before(x.until) {
		return nil
	}
	return &visitor{id: x.id, role: x.role, peer: r.RemoteAddr, session: session, until: x.until}
}

// may judges a visitor. The user of this machine may do what no row denies, as on
// the admin socket; an identity what a row allows; a person what its role allows and
// no row denies.
func (p *Page) may(c *visitor, method string) (bool, string) {
	effect, rule := p.cfg.Admins.JudgeAdmin(c.id, method, spiffeid.ID{})
	if c.role != "" && effect != mesh.Deny {
		return roleMay(c.role, method), "oidc:" + c.role
	}
	return effect == mesh.Allow || effect == "" && c.id.IsZero(), rule
}

// standing says if a visitor may go on looking.
func (p *Page) standing(c *visitor) bool {
	ok, _ := p.may(c, MethodView)
	return ok && p.proves(c)
}

// proves says if what a visitor has shown still holds.
func (p *Page) proves(c *visitor) bool {
	return p.cfg.Now().Before(c.until) && (c.serial == "" || !p.cfg.Revoked(c.serial))
}

// mayView refuses who may not look. Who enters is recorded, and who is refused.
func (p *Page) mayView(w http.ResponseWriter, r *http.Request, c *visitor, enters bool) bool {
	ok, rule := p.may(c, MethodView)
	now, method := p.cfg.Now(), MethodView
	seen := ok && !p.door.inside(c, now)
	if enters = enters || seen; enters {
		method = methodEnter
	}
	if (enters || !ok && p.door.tell(c.by(), now)) && !p.recorded(w, r, control.AdminCall{Caller: c.id, Method: method, Rule: rule, Peer: c.peer, Allowed: ok}) {
		return false
	}
	if seen {
		p.door.comesIn(c, now)
	}
	if !ok {
		http.Error(w, c.by()+" may not see the page: a row of admin.csv gives the right to "+MethodView, http.StatusForbidden)
	}
	return ok
}

// mayMove judges who would promote or abort a rollout. A row that denies it to
// the calls of operators denies it here: it is the same deed.
func (p *Page) mayMove(c *visitor) (bool, string) {
	if effect, rule := p.cfg.Admins.JudgeAdmin(c.id, methodMoveMesh, spiffeid.ID{}); effect == mesh.Deny {
		return false, rule
	}
	return p.may(c, MethodMoveRollout)
}

// mayWrite refuses a write that does not come from the page or that its sender
// may not make. It is recorded before the answer.
func (p *Page) mayWrite(w http.ResponseWriter, r *http.Request, c *visitor) bool {
	if !sameOrigin(r) || !hmac.Equal([]byte(r.Header.Get(csrfHeader)), []byte(p.csrf(c))) {
		http.Error(w, "this was not sent by the page; load it anew", http.StatusForbidden)
		return false
	}
	ok, rule := p.mayMove(c)
	if !p.recorded(w, r, control.AdminCall{Caller: c.id, Method: MethodMoveRollout, Rule: rule, Peer: c.peer, Allowed: ok}) {
		return false
	}
	if !ok {
		http.Error(w, c.by()+" may not do this: a row of admin.csv gives the right to "+MethodMoveRollout+", and none may deny "+methodMoveMesh, http.StatusForbidden)
	}
	return ok
}

func (p *Page) recorded(w http.ResponseWriter, r *http.Request, call control.AdminCall) bool {
	if err := p.cfg.OnAdmin(r.Context(), call); err != nil {
		p.cfg.Log.Error("call of the page not recorded, and refused", "method", call.Method, "err", err)
		http.Error(w, "it cannot be recorded, and so is not done", http.StatusServiceUnavailable)
		return false
	}
	return true
}

// sameOrigin says that a browser sent a request for a page of this origin.
func sameOrigin(r *http.Request) bool {
	scheme := "http://"
	if r.TLS != nil {
		scheme = "https://"
	}
	site := r.Header.Get("Sec-Fetch-Site")
	return (site == "" || site == "same-origin") && r.Header.Get("Origin") == scheme+r.Host
}
