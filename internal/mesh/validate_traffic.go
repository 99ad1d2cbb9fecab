package mesh

import (
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"
)

// The checks of what a route does with a call, and of what is said of all
// routes of a service.

func (c *routeChecker) redirect(r *Route) {
	d := r.Redirect
	c.word("redirect.scheme", d.Scheme, "http", "https")
	if d.Host != "" {
		if err := CheckHost(d.Host); err != nil {
			c.say(d.Host, "redirect: %s", err)
		}
	}
	c.newPath("redirect", d.Path, d.Prefix, r.Matches)
	if !slices.Contains([]int{301, 302, 303, 307, 308}, d.Status) {
		c.say("status:", "redirect: status %d is none of 301, 302, 303, 307 and 308", d.Status)
	}
	if d.Scheme == "" && d.Host == "" && d.Port == 0 && d.Path == "" && d.Prefix == "" {
		c.say("redirect:", "redirect leads to where the call came: name a scheme, host, port, path or prefix")
	}
}

func (c *routeChecker) respond(r *Respond) {
	within(c, "respond.status", r.Status, 200, 599)
	if len(r.Body) > maxRespond {
		c.say("body:", "respond: a body of %d bytes is longer than %d", len(r.Body), maxRespond)
	}
	if r.Body != "" && (r.Status == 204 || r.Status == 205 || r.Status == 304) {
		c.say("body:", "respond: an answer of status %d has no body", r.Status)
	}
	if !isFieldValue(r.Type) {
		c.say("content_type:", "respond: content_type %q is no value of a header field", clip(r.Type))
	}
}

func (c *routeChecker) rewrite(r *Route) {
	if r.Rewrite.Host != "" {
		if err := CheckHost(r.Rewrite.Host); err != nil {
			c.say(r.Rewrite.Host, "rewrite: %s", err)
		}
	}
	if h := r.Rewrite.Host; h != "" && c.file.Service != "" {
		for _, b := range r.Backends {
			if b.Service != "" && b.Service != c.file.Service {
				c.say(h, "rewrite: %q is told by the sidecar of %q, which the routes of %s do not tell: write the host into a route of its own service", clip(h), b.Service, c.file.Service)
			}
		}
	}
	c.newPath("rewrite", r.Rewrite.Path, r.Rewrite.Prefix, r.Matches)
	c.edit("rewrite.headers", r.Rewrite.Fields)
}

// newPath checks what a path, or the prefix of it that matched, becomes.
func (c *routeChecker) newPath(field, path, prefix string, matches []Match) {
	if path != "" && prefix != "" {
		c.say("prefix:", "%s: path and prefix are both there", field)
	}
	if s := path + prefix; s != "" {
		if s[0] != '/' {
			c.say(s, "%s: %q does not start with \"/\"", field, clip(s))
		} else if err := checkPathForm(s); err != nil {
			c.say(s, "%s: %q: %s", field, clip(s), err)
		}
	}
	unclear := func(m Match) bool { return m.Path == nil || m.Path.Prefix == "" }
	if prefix != "" && path == "" && (len(matches) == 0 || slices.ContainsFunc(matches, unclear)) {
		c.say("prefix:", "%s: prefix takes the place of the prefix that matched, and not every match of the route has one", field)
	}
}

// reservedFields are those that say how a message is framed, who is called, or
// what only a proxy knows. No route changes them.
var reservedFields = []string{
	"connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "host", "expect",
	"proxy-authenticate", "proxy-authorization", "proxy-connection", "http2-settings", "forwarded", "x-real-ip",
	"traceparent", "tracestate", "x-request-id",
}

func reservedField(name string) bool {
	n := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	return slices.Contains(reservedFields, n) || strings.HasPrefix(n, "sallyport-") || strings.HasPrefix(n, "x-forwarded-") || strings.HasPrefix(n, "x-envoy-")
}

func (c *routeChecker) edit(field string, e FieldEdit) {
	if n := len(e.Set) + len(e.Add) + len(e.Remove); n > maxFields {
		c.say("", "%s: %d changes are more than %d", field, n, maxFields)
	}
	seen := map[string]bool{}
	name := func(n string) {
		key := strings.ToLower(n)
		if err := checkFieldName(n); err != nil {
			c.say(n, "%s: %s", field, err)
		} else if reservedField(n) {
			c.say(n, "%s: %s is not a route's to change", field, clip(n))
		} else if seen[key] {
			c.say(n, "%s: %q is named twice", field, clip(n))
		}
		seen[key] = true
	}
	for _, m := range []map[string]string{e.Set, e.Add} {
		for _, n := range sortedKeys(m) {
			name(n)
			if !isFieldValue(m[n]) {
				c.say(n, "%s: the value of %q is no value of a header field", field, clip(n))
			}
		}
	}
	for _, n := range e.Remove {
		name(n)
	}
}

// isFieldValue reports what may stand in a header field: visible ASCII, with
// blanks only inside.
func isFieldValue(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) <= 4096 && strings.TrimSpace(s) == s
}

func (c *routeChecker) cors(r *CORS) {
	if len(r.Origins) == 0 {
		c.say("cors:", "cors: allow_origins is missing")
	}
	for _, o := range r.Origins {
		u, err := url.Parse(strings.Replace(o, "://*.", "://x.", 1))
		switch {
		case o == "*" && r.Credentials:
			c.say(o, "cors: with allow_credentials each origin is written out: \"*\" would let every site act as the user")
		case o == "*":
		case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || o != strings.ToLower(o) || strings.Contains(u.Host, "*") || u.Scheme+"://"+u.Host != strings.Replace(o, "://*.", "://x.", 1):
			c.say(o, "cors: %q is not an origin like https://shop.example or https://*.shop.example", clip(o))
		}
	}
	for field, list := range map[string][]string{"allow_methods": r.Methods, "allow_headers": r.Headers, "expose_headers": r.Expose} {
		if i := slices.IndexFunc(list, func(s string) bool { return !isToken(s) }); i >= 0 {
			c.say(list[i], "cors: %s: %q is no name", field, clip(list[i]))
		}
		if len(list) > maxMatches {
			c.say(field+":", "cors: %s: %d names are more than %d", field, len(list), maxMatches)
		}
	}
	within(c, "cors.max_age", r.MaxAge, 0, 24*time.Hour)
}

func (c *routeChecker) sticky(field string, s *Sticky) {
	if s.By == "" {
		c.say(field+":", "%s: by is missing: header, cookie, claim, caller or trace", field)
	}
	c.word(field+".by", s.By, "header", "cookie", "claim", "caller", "trace")
	if s.By == "claim" {
		c.claims(field[strings.LastIndexByte(field, '.')+1:])
	}
	named := s.By == "header" || s.By == "cookie" || s.By == "claim"
	switch {
	case named && s.Name == "":
		c.say(field+":", "%s: name is missing: by which %s?", field, s.By)
	case !named && s.Name != "":
		c.say(s.Name, "%s: name has no meaning for by: %s", field, s.By)
	case s.By != "claim" && named && checkFieldName(s.Name) != nil:
		c.say(s.Name, "%s: %q is not the name of a %s", field, clip(s.Name), s.By)
	}
	if c.tcp && (named || s.By == "trace") {
		c.say(s.By, "%s: the service speaks tcp: a connection has a caller, and no more", field)
	}
}

// statusNames are the names of the statuses of gRPC, by number.
var statusNames = []string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
	"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

// GRPCStatus is the number of a status of gRPC, -1 for what is no name of one.
func GRPCStatus(name string) int { return slices.Index(statusNames, name) }

func (c *routeChecker) patience(r *Route) {
	t := r.Timeouts
	within(c, "timeouts.request", t.Request, 0, 24*time.Hour)
	within(c, "timeouts.backend_request", t.Try, 0, 24*time.Hour)
	within(c, "timeouts.idle", t.Idle, 0, longest)
	within(c, "timeouts.connect", t.Connect, 0, time.Minute)
	if t.Request > 0 && t.Try > t.Request {
		c.say("backend_request:", "timeouts: backend_request %s is longer than request %s, which bounds all tries together", t.Try, t.Request)
	}
	if r.Hedge != nil {
		c.hedge(r.Hedge)
	}
	if l := r.Limit; l != nil {
		within(c, "limit.rate", l.Rate, 1, maxWeight)
		within(c, "limit.burst", l.Burst, 0, maxWeight)
		switch {
		case l.Claim() == "":
			c.word("limit.by", l.By, "route", "caller")
		case l.Shared:
			c.say("shared:", "limit: what is counted by a claim is counted by each sidecar: a shared limit is by route or caller")
		default:
			c.claims("limit")
		}
	}
	y := r.Retry
	if y == nil {
		return
	}
	within(c, "retry.attempts", y.Attempts, 0, 5)
	within(c, "retry.backoff", y.Base, 0, time.Minute)
	within(c, "retry.max_backoff", y.Max, 0, time.Minute)
	if y.Max > 0 && y.Base > y.Max {
		c.say("backoff:", "retry: backoff %s is longer than max_backoff %s", y.Base, y.Max)
	}
	for _, code := range y.Codes {
		if code != 408 && code != 409 && code != 425 && code != 429 && (code < 500 || code > 599) {
			c.say("codes:", "retry: %d is nothing to try again for: 408, 409, 425, 429 and 500 to 599 are", code)
		}
	}
	for _, name := range y.GRPC {
		c.status("retry.grpc", name)
	}
}

func (c *routeChecker) hedge(h *Hedge) {
	switch {
	case (h.After != 0) == (h.Of != 0):
		c.say("hedge:", "hedge: want exactly one of after and of: after which time, or when which share of the calls has its answer?")
	case h.After != 0:
		within(c, "hedge.after", h.After, time.Millisecond, time.Minute)
		if h.Max != 0 {
			c.say("max:", "hedge: max has no meaning beside after: it bounds what of finds")
		}
	default:
		within(c, "hedge.max", h.Max, time.Millisecond, time.Minute)
		if h.Of < Whole/2 || h.Of > Whole*999/1000 {
			c.say("of:", "hedge: of %s is not from 50%% to 99.9%%", h.Of)
		}
	}
}

// status checks the name of a status of gRPC that is a failure.
func (c *routeChecker) status(field, name string) {
	if GRPCStatus(name) < 1 {
		c.say(name, "%s: unknown status %q%s", field, clip(name), didYouMean(strings.ToUpper(name), statusNames[1:]))
	}
}

func (c *routeChecker) disturbances(r *Route) {
	if len(r.Faults) > maxBackends || len(r.Shadows) > maxBackends {
		c.say("", "more than %d faults or shadows of one route", maxBackends)
	}
	for i := range r.Faults {
		c.fault(&r.Faults[i])
	}
	for i := range r.Shadows {
		c.shadow(r, &r.Shadows[i])
	}
}

func (c *routeChecker) fault(f *Fault) {
	if !plainWord(f.Name, 63) {
		c.say("faults:", "fault %q: a name is 1 to 63 letters, digits, hyphens, dots or underscores", clip(f.Name))
	} else {
		twice(c.validator, c.faults, f.Name, c.at, "fault")
	}
	c.matches("matches", f.Match)
	if f.Share < 1 {
		c.say(f.Name, "fault %q: share is missing: of how many calls?", clip(f.Name))
	}
	ends := 0
	for _, there := range []bool{f.Status != 0, f.GRPC != "", f.Reset, f.Bandwidth != 0} {
		if there {
			ends++
		}
	}
	switch {
	case ends > 1:
		c.say(f.Name, "fault %q: status, grpc, reset and bandwidth are more than one", clip(f.Name))
	case ends == 0 && f.Delay == 0:
		c.say(f.Name, "fault %q does nothing: want delay, status, grpc, reset or bandwidth", clip(f.Name))
	case c.tcp && (f.Status != 0 || f.GRPC != ""):
		c.say(f.Name, "fault %q: the service speaks tcp, which has no status", clip(f.Name))
	}
	within(c, "delay", f.Delay, 0, 5*time.Minute)
	within(c, "bandwidth", f.Bandwidth, 0, 1<<40)
	within(c, "max_active", f.MaxActive, 0, 10_000)
	if f.Status != 0 {
		within(c, "status", f.Status, 400, 599)
	}
	if f.GRPC != "" {
		c.status("grpc", f.GRPC)
	}
	if len(f.Callers) == 0 {
		c.say(f.Name, "fault %q: callers is missing: whom may it touch?", clip(f.Name))
	}
	c.from("callers", f.Callers)
	switch length := f.Until.Sub(f.Since); {
	case f.Since.IsZero() || f.Until.IsZero():
		c.say(f.Name, "fault %q: since or until is missing: a fault ends by itself", clip(f.Name))
	case length <= 0 || length > maxFaultWindow:
		c.say("until:", "fault %q: until is %s after since: want more than 0 and at most 24h", clip(f.Name), length)
	}
}

func (c *routeChecker) shadow(r *Route, s *Shadow) {
	if !plainWord(s.Name, 63) {
		c.say("shadows:", "shadow %q: a name is 1 to 63 letters, digits, hyphens, dots or underscores", clip(s.Name))
	} else {
		twice(c.validator, c.shadows, s.Name, c.at, "shadow")
	}
	c.matches("matches", s.Match)
	if s.Share < 1 {
		c.say(s.Name, "shadow %q: share is missing: of how many calls?", clip(s.Name))
	}
	c.backend("shadows", s.Service)
	primaries := r.Backends
	if len(primaries) == 0 {
		primaries = []Backend{{}}
	}
	same := func(b Backend) bool {
		of, to := b.Service, s.Service.Service
		if of == "" {
			of = c.file.Service
		}
		if to == "" {
			to = c.file.Service
		}
		return of == to && b.Address == s.Service.Address && b.Subset == s.Service.Subset
	}
	if slices.ContainsFunc(primaries, same) {
		c.say(s.Name, "shadow %q: %s gets the calls themselves: a shadow is another service or subset", clip(s.Name), c.nameOf(s.Service))
	}
	if s.Noise != nil {
		c.backend("noise", *s.Noise)
		if !s.Compare {
			c.say("noise:", "shadow %q: noise has no meaning without compare: true", clip(s.Name))
		}
	}
	if len(s.Ignore) > maxMatches || slices.Contains(s.Ignore, "") {
		c.say("ignore:", "shadow %q: ignore has an empty name, or more than %d", clip(s.Name), maxMatches)
	}
	if s.Archive != "" && !plainWord(s.Archive, 63) {
		c.say(s.Archive, "shadow %q: archive %q is not the name of one", clip(s.Name), clip(s.Archive))
	}
}

func (c *routeChecker) translate(t *Translate) {
	if t.To == "" {
		c.say("translate:", "translate: to is missing: grpc or rest")
	}
	c.word("translate.to", t.To, "grpc", "rest")
	if (t.Descriptors != "") == t.Reflection {
		c.say("translate:", "translate: want exactly one of descriptors and reflection")
	}
	if t.Reflection && t.To == "rest" {
		c.say("reflection:", "translate: a service that speaks REST has no reflection: name a file of descriptors")
	}
	if c.file.Host != "" {
		c.say("translate:", "translate: %s is no service of the mesh, beside which calls are translated", c.file.Host)
	}
	if one := c.file.Translation(); !reflect.DeepEqual(one, t) {
		c.say("translate:", "translate: another route of the service has another translation, and a service has one: a path means the same method to all")
	}
	for _, s := range t.Services {
		c.grpc(&GRPCMethod{Service: s})
	}
	if len(t.Services) > maxMatches {
		c.say("services:", "translate: %d services are more than %d", len(t.Services), maxMatches)
	}
}
