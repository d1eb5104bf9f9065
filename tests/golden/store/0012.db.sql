BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0012');
CREATE TABLE ancestry (
	session_id VARCHAR(36) NOT NULL, 
	ancestor_id VARCHAR(36) NOT NULL, 
	CONSTRAINT pk_ancestry PRIMARY KEY (session_id, ancestor_id)
);
CREATE TABLE api_keys (
	id VARCHAR(36) NOT NULL, 
	user_id VARCHAR(64) NOT NULL, 
	name VARCHAR(200), 
	prefix VARCHAR(32) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	scopes JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	revoked_at DATETIME, 
	last_used_at DATETIME, 
	CONSTRAINT pk_api_keys PRIMARY KEY (id), 
	CONSTRAINT fk_api_keys_user_id FOREIGN KEY(user_id) REFERENCES users (id) ON DELETE CASCADE, 
	CONSTRAINT uq_api_keys_hash UNIQUE (hash)
);
CREATE TABLE artifacts (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	path TEXT NOT NULL, 
	size BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_artifacts PRIMARY KEY (id), 
	CONSTRAINT fk_artifacts_session_id FOREIGN KEY(session_id) REFERENCES sessions (id) ON DELETE CASCADE
);
CREATE TABLE audit (
	id VARCHAR(36) NOT NULL, 
	at DATETIME NOT NULL, 
	principal VARCHAR(256) NOT NULL, 
	user_id VARCHAR(128), 
	action VARCHAR(128) NOT NULL, 
	object_type VARCHAR(32), 
	object_id VARCHAR(128), 
	address VARCHAR(64), 
	request_id VARCHAR(64), 
	outcome INTEGER NOT NULL, 
	details JSON NOT NULL, 
	CONSTRAINT pk_audit PRIMARY KEY (id)
);
CREATE TABLE commits (
	writer VARCHAR(36) NOT NULL, 
	number BIGINT NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_commits PRIMARY KEY (writer)
);
CREATE TABLE counters (
	name VARCHAR(64) NOT NULL, 
	value BIGINT NOT NULL, 
	CONSTRAINT pk_counters PRIMARY KEY (name)
);
INSERT INTO "counters" VALUES('session',7);
CREATE TABLE doomed_objects (
	prefix VARCHAR(255) NOT NULL, 
	CONSTRAINT pk_doomed_objects PRIMARY KEY (prefix)
);
CREATE TABLE environments (
	name VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	spec JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(128), 
	CONSTRAINT pk_environments PRIMARY KEY (name, version)
);
CREATE TABLE events (
	session_id VARCHAR(36) NOT NULL, 
	seq BIGINT NOT NULL, 
	turn_id VARCHAR(36), 
	type VARCHAR(64) NOT NULL, 
	at DATETIME NOT NULL, 
	data TEXT NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (session_id, seq), 
	CONSTRAINT fk_events_session_id FOREIGN KEY(session_id) REFERENCES sessions (id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES('01a00000-0000-7000-8000-000000000001',1,NULL,'session.created','2026-01-02 03:04:05.678901','{"title":"a title","forked_from":null,"forked_at_turn":null}');
INSERT INTO "events" VALUES('01a00000-0000-7000-8000-000000000001',2,'01a00000-0000-7000-8000-000000000002','turn.queued','2026-01-02 03:04:05.678901','{"number":1,"ahead":0}');
INSERT INTO "events" VALUES('01a00000-0000-7000-8000-000000000001',3,'01a00000-0000-7000-8000-000000000002','turn.completed','2026-01-02 03:04:05.678901','{"status":"succeeded","stop_reason":"end_turn","error":null,"structured_output":null,"usage":{"input_tokens":0,"output_tokens":0,"cache_creation_input_tokens":0,"cache_read_input_tokens":0},"cost_usd":null,"num_turns":0,"duration_ms":null}');
CREATE TABLE idempotency (
	principal VARCHAR(128) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	boot_id VARCHAR(36) NOT NULL, 
	object_id VARCHAR(36), 
	status INTEGER, 
	body TEXT, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_idempotency PRIMARY KEY (principal, "key")
);
INSERT INTO "idempotency" VALUES('alice','k','f','b','01a00000-0000-7000-8000-000000000001',201,'{}','2026-01-02 03:04:05.678901');
CREATE TABLE interactions (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	owner VARCHAR(128) NOT NULL, 
	turn_id VARCHAR(36), 
	kind VARCHAR(16) NOT NULL, 
	tool VARCHAR(255) NOT NULL, 
	tool_use_id VARCHAR(128), 
	input JSON NOT NULL, 
	input_digest VARCHAR(64) NOT NULL, 
	reason TEXT, 
	status VARCHAR(16) NOT NULL, 
	answer JSON, 
	answered_by VARCHAR(255), 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	resolved_at DATETIME, root_session_id VARCHAR(36) DEFAULT '' NOT NULL, title TEXT, suggestions JSON DEFAULT '[]' NOT NULL, options JSON DEFAULT '[]' NOT NULL, remind_at DATETIME, remind_seconds FLOAT, lone BOOLEAN DEFAULT 0 NOT NULL, parked BOOLEAN DEFAULT 0 NOT NULL, taken_at DATETIME, 
	CONSTRAINT pk_interactions PRIMARY KEY (id), 
	CONSTRAINT fk_interactions_session_id FOREIGN KEY(session_id) REFERENCES sessions (id) ON DELETE CASCADE
);
CREATE TABLE network_requests (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	port INTEGER NOT NULL, 
	verdict VARCHAR(16) NOT NULL, 
	reason VARCHAR(32) NOT NULL, 
	count BIGINT NOT NULL, 
	first_at DATETIME NOT NULL, 
	last_at DATETIME NOT NULL, 
	CONSTRAINT pk_network_requests PRIMARY KEY (id), 
	CONSTRAINT fk_network_requests_session_id FOREIGN KEY(session_id) REFERENCES sessions (id) ON DELETE CASCADE, 
	CONSTRAINT uq_network_requests_kind UNIQUE (session_id, host, port, verdict, reason)
);
CREATE TABLE permission_rules (
	id VARCHAR(36) NOT NULL, 
	owner VARCHAR(128), 
	scope VARCHAR(16) NOT NULL, 
	target VARCHAR(128) NOT NULL, 
	effect VARCHAR(8) NOT NULL, 
	rule TEXT NOT NULL, 
	interaction_id VARCHAR(36), 
	created_by VARCHAR(255) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_permission_rules PRIMARY KEY (id)
);
CREATE TABLE reservations (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	turn_id VARCHAR(36), 
	model VARCHAR(200) NOT NULL, 
	tokens BIGINT NOT NULL, 
	cost_usd FLOAT, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_reservations PRIMARY KEY (id)
);
CREATE TABLE sandboxes (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	generation INTEGER NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	runtime VARCHAR(32) NOT NULL, 
	state JSON NOT NULL, 
	acked BIGINT NOT NULL, 
	link_token_hash VARCHAR(64) NOT NULL, 
	agent_token_hash VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	ended_at DATETIME, network JSON, environment VARCHAR(80), 
	CONSTRAINT pk_sandboxes PRIMARY KEY (id), 
	CONSTRAINT uq_sandboxes_agent_token_hash UNIQUE (agent_token_hash)
);
INSERT INTO "sandboxes" VALUES('01a00000-0000-7000-8000-000000000003','01a00000-0000-7000-8000-000000000001',1,'live','local','{"folder": "/x", "pid": 1, "sandbox_id": "01a00000-0000-7000-8000-000000000003"}',9,'l','a','2026-01-02 03:04:05.678901',NULL,NULL,NULL);
CREATE TABLE secrets (
	name VARCHAR(128) NOT NULL, 
	key_id VARCHAR(32) NOT NULL, 
	sealed TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	updated_at DATETIME NOT NULL, 
	updated_by VARCHAR(128), 
	CONSTRAINT pk_secrets PRIMARY KEY (name)
);
CREATE TABLE "sessions" (
	id VARCHAR(36) NOT NULL, 
	number BIGINT NOT NULL, 
	owner VARCHAR(128) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	stop_reason VARCHAR(32), 
	title TEXT, 
	spec JSON NOT NULL, 
	workspace JSON NOT NULL, 
	metadata JSON NOT NULL, 
	forked_from VARCHAR(36), 
	agent_session_id VARCHAR(64), 
	generation INTEGER NOT NULL, 
	last_seq BIGINT NOT NULL, 
	turn_count INTEGER NOT NULL, 
	usage JSON NOT NULL, 
	cost_usd FLOAT, 
	error JSON, 
	created_at DATETIME NOT NULL, 
	last_active_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	ttl_seconds INTEGER, 
	deleting BOOLEAN DEFAULT 0 NOT NULL, 
	budget JSON, 
	uid_number BIGINT, 
	workspace_id VARCHAR(36), 
	rewound JSON DEFAULT '[]' NOT NULL, 
	snapshot_due VARCHAR(36), 
	restoring JSON, 
	reserved VARCHAR(64), 
	environment VARCHAR(64) DEFAULT 'default' NOT NULL, 
	environment_version INTEGER DEFAULT '0' NOT NULL, 
	parent_id VARCHAR(36), 
	root_id VARCHAR(36), 
	depth INTEGER DEFAULT '0' NOT NULL, 
	lineage JSON DEFAULT '[]' NOT NULL, 
	birth JSON, 
	files_of VARCHAR(36), 
	paused_turn VARCHAR(36), 
	CONSTRAINT pk_sessions PRIMARY KEY (id), 
	CONSTRAINT uq_sessions_number UNIQUE (number)
);
INSERT INTO "sessions" VALUES('01a00000-0000-7000-8000-000000000001',7,'alice','ready','end_turn','a title','{"model": "m"}','{"type": "ephemeral"}','{"\u043a\u043b\u044e\u0447": ["\ud834\udd1e", null]}',NULL,'a-1',1,3,1,'{"input_tokens": 3, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}',0.25,'null','2026-01-02 03:04:05.678901','2026-01-02 03:04:05.678901','2026-01-02 03:04:05.678901',60,0,NULL,NULL,NULL,'[]',NULL,NULL,NULL,'default',0,NULL,NULL,0,'[]',NULL,NULL,NULL);
CREATE TABLE snapshots (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	workspace_id VARCHAR(36), 
	number BIGINT NOT NULL, 
	reason VARCHAR(16) NOT NULL, 
	turn_id VARCHAR(36), 
	seq BIGINT NOT NULL, 
	exact BOOLEAN NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	stored_bytes BIGINT NOT NULL, 
	files BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_snapshots PRIMARY KEY (id)
);
CREATE TABLE stopped_environments (
	name VARCHAR(64) NOT NULL, 
	CONSTRAINT pk_stopped_environments PRIMARY KEY (name)
);
CREATE TABLE tickets (
	hash VARCHAR(64) NOT NULL, 
	principal JSON NOT NULL, 
	reusable BOOLEAN NOT NULL, 
	expires_at DATETIME NOT NULL, 
	CONSTRAINT pk_tickets PRIMARY KEY (hash)
);
CREATE TABLE transcript_entries (
	session_id VARCHAR(36) NOT NULL, 
	subpath VARCHAR(512) NOT NULL, 
	n BIGINT NOT NULL, 
	uuid VARCHAR(64), 
	turn_id VARCHAR(36), 
	line TEXT NOT NULL, 
	CONSTRAINT pk_transcript_entries PRIMARY KEY (session_id, subpath, n), 
	CONSTRAINT fk_transcript_entries_session_id FOREIGN KEY(session_id) REFERENCES sessions (id) ON DELETE CASCADE, 
	CONSTRAINT uq_transcript_entries_session_id_subpath_uuid UNIQUE (session_id, subpath, uuid)
);
INSERT INTO "transcript_entries" VALUES('01a00000-0000-7000-8000-000000000001','',1,'u1','01a00000-0000-7000-8000-000000000002','{"uuid":"u1","text":"é"}');
CREATE TABLE turns (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	number INTEGER NOT NULL, 
	origin VARCHAR(16) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	stop_reason VARCHAR(32), 
	content JSON, 
	options JSON NOT NULL, 
	error JSON, 
	structured_output JSON, 
	usage JSON NOT NULL, 
	cost_usd FLOAT, 
	num_turns INTEGER NOT NULL, 
	duration_ms BIGINT, 
	sandbox_id VARCHAR(36), 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	ended_at DATETIME, 
	expires_at DATETIME, 
	deadline_at DATETIME, 
	interrupt_reason VARCHAR(32), 
	CONSTRAINT pk_turns PRIMARY KEY (id), 
	CONSTRAINT fk_turns_session_id FOREIGN KEY(session_id) REFERENCES sessions (id) ON DELETE CASCADE, 
	CONSTRAINT uq_turns_session_id_number UNIQUE (session_id, number)
);
INSERT INTO "turns" VALUES('01a00000-0000-7000-8000-000000000002','01a00000-0000-7000-8000-000000000001',1,'prompt','succeeded','end_turn','[{"type": "text", "text": "hi"}]','{"timeout_seconds": 1.5}','null','null','{"input_tokens": 3, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}',0.25,2,12,'01a00000-0000-7000-8000-000000000003','2026-01-02 03:04:05.678901','2026-01-02 03:04:05.678901','2026-01-02 03:04:05.678901',NULL,NULL,NULL);
CREATE TABLE "usage" (
	id VARCHAR(36) NOT NULL, 
	session_id VARCHAR(36) NOT NULL, 
	turn_id VARCHAR(36), 
	model VARCHAR(200) NOT NULL, 
	input_tokens BIGINT NOT NULL, 
	output_tokens BIGINT NOT NULL, 
	cache_creation_input_tokens BIGINT NOT NULL, 
	cache_read_input_tokens BIGINT NOT NULL, 
	cost_usd FLOAT, 
	at DATETIME NOT NULL, 
	user_id VARCHAR(128) DEFAULT 'admin' NOT NULL, 
	CONSTRAINT pk_usage PRIMARY KEY (id)
);
INSERT INTO "usage" VALUES('r1','01a00000-0000-7000-8000-000000000001','01a00000-0000-7000-8000-000000000002','m',3,5,0,0,0.25,'2026-01-02 03:04:05.678901','admin');
CREATE TABLE users (
	id VARCHAR(64) NOT NULL, 
	disabled BOOLEAN NOT NULL, 
	budget JSON, 
	daily_budget JSON, 
	max_sessions INTEGER, 
	number BIGINT, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_users PRIMARY KEY (id)
);
CREATE TABLE workspaces (
	id VARCHAR(36) NOT NULL, 
	owner VARCHAR(128) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	mode VARCHAR(16) NOT NULL, 
	quota_mb BIGINT, 
	size_bytes BIGINT, 
	number BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	last_used_at DATETIME NOT NULL, 
	deleting BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT pk_workspaces PRIMARY KEY (id), 
	CONSTRAINT uq_workspaces_owner_name UNIQUE (owner, name)
);
CREATE INDEX ix_idempotency_created_at ON idempotency (created_at);
CREATE INDEX ix_sandboxes_session_id_generation ON sandboxes (session_id, generation);
CREATE INDEX ix_sandboxes_status ON sandboxes (status);
CREATE INDEX ix_events_turn_id ON events (turn_id);
CREATE INDEX ix_turns_status_session_id ON turns (status, session_id);
CREATE INDEX ix_api_keys_user_id ON api_keys (user_id);
CREATE INDEX ix_tickets_expires_at ON tickets (expires_at);
CREATE INDEX ix_audit_at ON audit (at);
CREATE INDEX ix_audit_user_id_at ON audit (user_id, at);
CREATE INDEX ix_audit_object_id ON audit (object_id);
CREATE INDEX ix_reservations_user_id ON reservations (user_id);
CREATE INDEX ix_reservations_session_id ON reservations (session_id);
CREATE INDEX ix_usage_session_id_at ON usage (session_id, at);
CREATE INDEX ix_usage_turn_id ON usage (turn_id);
CREATE INDEX ix_usage_user_id_at ON usage (user_id, at);
CREATE INDEX ix_snapshots_session_id_number ON snapshots (session_id, number);
CREATE INDEX ix_snapshots_workspace_id_number ON snapshots (workspace_id, number);
CREATE INDEX ix_snapshots_turn_id ON snapshots (turn_id);
CREATE INDEX ix_snapshots_key ON snapshots ("key");
CREATE INDEX ix_artifacts_session_id_id ON artifacts (session_id, id);
CREATE INDEX ix_interactions_session_id_id ON interactions (session_id, id);
CREATE INDEX ix_interactions_owner_status_id ON interactions (owner, status, id);
CREATE INDEX ix_interactions_status_id ON interactions (status, id);
CREATE INDEX ix_sessions_environment ON sessions (environment);
CREATE INDEX ix_sessions_expires_at ON sessions (expires_at);
CREATE INDEX ix_sessions_snapshot_due ON sessions (snapshot_due);
CREATE INDEX ix_sessions_owner_number ON sessions (owner, number);
CREATE INDEX ix_sessions_status_number ON sessions (status, number);
CREATE INDEX ix_sessions_workspace_id ON sessions (workspace_id);
CREATE INDEX ix_sessions_reserved ON sessions (reserved) WHERE reserved IS NOT NULL;
CREATE INDEX ix_sessions_parent_id ON sessions (parent_id);
CREATE INDEX ix_ancestry_ancestor_id ON ancestry (ancestor_id);
CREATE INDEX ix_interactions_root_session_id_id ON interactions (root_session_id, id);
CREATE INDEX ix_permission_rules_scope_target ON permission_rules (scope, target);
CREATE INDEX ix_permission_rules_owner_id ON permission_rules (owner, id);
COMMIT;
